//! STS refuses, throttles, hangs, is slow, or sends invalid answers.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use jiff::Timestamp;
use lab::{
    fake::{Injected, kubernetes::PodRecord},
    loopback::{LoopbackNode, schedule},
    pod_client::Attempt,
    role_arn,
};
use tokio::time::Instant;

use super::{PATIENCE, eventually, pod, start};

/// Renewed after ten seconds, the soonest.
const SESSION: Duration = Duration::from_secs(15);

/// One fault, of one role.
struct Case {
    role: &'static str,
    fault: Injected,
    /// What a pod without valid credentials is told.
    says: &'static str,
    /// Asked again within seconds; the others are left alone for longer.
    soon: bool,
}

fn cases() -> Vec<Case> {
    let case = |role, fault, says| Case { role, fault, says, soon: true };
    let later = |role, fault, says| Case { role, fault, says, soon: false };
    vec![
        later("refused", Injected::refuse(403, "AccessDenied"), "AccessDenied"),
        later("throttled", Injected::refuse(400, "Throttling"), "Throttling"),
        case("failing", Injected::refuse(500, "InternalFailure"), "InternalFailure"),
        case("node-expired", Injected::refuse(403, "ExpiredToken"), "ExpiredToken"),
        case("hanging", Injected::hang(), "AWS has not answered"),
        case("cut", Injected::cut(), "STS can't be reached"),
        case("proxy", Injected::body(502, "<html>Bad Gateway</html>"), "not from STS"),
        case("garbage", Injected::body(200, "\u{1}{}"), "not from STS"),
        case("nothing", Injected::without("Credentials"), "STS returned no credentials"),
        case("tokenless", Injected::without("SessionToken"), "empty field"),
        case("keyless", Injected::without("AccessKeyId"), "empty field"),
        case("endless", Injected::without("Expiration"), "expired"),
        case("expired", Injected::expired(), "expired"),
        case(
            "mistaken",
            Injected::for_session("arn:aws:sts::123456789012:assumed-role/other/kiam-kiam"),
            "another role",
        ),
    ]
}

/// A pod that asks all the time, and what it has seen.
struct Asking {
    pod: PodRecord,
    role: String,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Until when it may use what it was given last.
    holds: Option<Timestamp>,
    /// Why it was refused last, if that was the last answer.
    refused: Option<String>,
}

// === impl Asking ===

impl Asking {
    fn new(number: usize, role: &str) -> Self {
        let pod = pod(u16::try_from(number).unwrap(), role);
        Self { pod, role: role.to_owned(), seen: Mutex::default() }
    }

    /// Asks once: its own role's valid credentials, or none, and those only when what it had has expired.
    fn ask(&self, node: &LoopbackNode) {
        let before = Timestamp::now();
        let attempt = node.credentials(&self.pod);
        let after = Timestamp::now();
        let mut seen = self.seen.lock().unwrap();
        if attempt.status == Some(200) {
            assert_eq!(node.role_of(&attempt), Some(role_arn(&self.role)), "{attempt:?}");
            let expires: Timestamp = attempt.field("Expiration").unwrap().parse().unwrap();
            assert!(expires > before, "served at {before}, expired: {attempt:?}");
            *seen = Seen { holds: Some(expires), refused: None };
        } else {
            assert!(self.is_refusal(&attempt), "{}: {attempt:?}", self.role);
            let holds = seen.holds.is_some_and(|expires| expires > after);
            assert!(!holds, "{} was refused at {after}: {seen:?}: {attempt:?}", self.role);
            seen.refused = Some(attempt.reason().to_owned());
        }
    }

    /// What is denied is as if there were no role, and all else is over at some time.
    fn is_refusal(&self, attempt: &Attempt) -> bool {
        let denied = attempt.reason().contains("AccessDenied");
        attempt.status == Some(if denied { 404 } else { 503 })
    }

    fn is_served(&self) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.holds.is_some() && seen.refused.is_none()
    }

    /// Waits until it is refused and told so.
    fn until_told(&self, says: &str) {
        let told = || self.seen.lock().unwrap().refused.clone().unwrap_or_default();
        let begun = Instant::now();
        while !told().contains(says) {
            let role = &self.role;
            assert!(begun.elapsed() < PATIENCE, "{role}: {says:?} never came, but {:?}", told());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Has all pods ask all the time while `story` runs.
fn meanwhile(node: &LoopbackNode, pods: &[Asking], story: impl FnOnce()) {
    /// Ends the asking, also when the story fails.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = End(&ended);
        for pod in pods {
            let ended = &ended;
            scope.spawn(move || {
                while !ended.load(Ordering::SeqCst) {
                    pod.ask(node);
                    thread::sleep(Duration::from_millis(50));
                }
            });
        }
        story();
        drop(end);
    });
}

#[test]
fn what_is_held_is_served_until_it_expires_whatever_sts_does() {
    let cases = cases();
    let slow = cases.len();
    let roles = cases.iter().map(|case| case.role).chain(["slow"]);
    let pods: Vec<Asking> = roles.enumerate().map(|(n, role)| Asking::new(n, role)).collect();
    let node = start(&[], |kubernetes, sts| {
        sts.set_session_length(Some(SESSION));
        pods.iter().for_each(|asking| schedule(kubernetes, &asking.pod));
    });
    meanwhile(&node, &pods, || {
        eventually("credentials of all", || pods.iter().all(Asking::is_served));
        let faults: Vec<_> = cases
            .iter()
            .map(|case| {
                let fault = case.fault.clone().field("RoleArn", &role_arn(case.role));
                node.sts.faults().inject(fault)
            })
            .collect();
        let late = Injected::slow(Duration::from_secs(2)).field("RoleArn", &role_arn("slow"));
        let late = node.sts.faults().inject(late);
        for ((case, fault), asking) in cases.iter().zip(&faults).zip(&pods) {
            eventually(&format!("a renewal: {}", case.role), || fault.met() > 0);
            asking.until_told(case.says);
        }
        assert!(late.met() > 0);
        assert!(pods[slow].is_served(), "a late renewal is not noticed");
    });
}

#[test]
fn a_new_pod_is_told_what_sts_did_and_gets_credentials_when_that_is_over() {
    let cases = cases();
    let node = start(&[], |_, _| ());
    let pods: Vec<Asking> =
        cases.iter().enumerate().map(|(n, case)| Asking::new(n, case.role)).collect();
    let faults: Vec<_> = cases
        .iter()
        .map(|case| {
            let fault = case.fault.clone().field("RoleArn", &role_arn(case.role));
            node.sts.faults().inject(fault)
        })
        .collect();
    for asking in &pods {
        schedule(&node.kubernetes, &asking.pod);
        eventually("a known pod", || asking.is_refusal(&node.credentials(&asking.pod)));
    }
    meanwhile(&node, &pods, || {
        for (case, asking) in cases.iter().zip(&pods) {
            asking.until_told(case.says);
        }
        faults.iter().for_each(|fault| fault.lift());
        for (case, asking) in cases.iter().zip(&pods).filter(|(case, _)| case.soon) {
            eventually(&format!("credentials after {}", case.role), || asking.is_served());
        }
    });
}
