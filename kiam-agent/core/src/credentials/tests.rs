//! The prefetcher under virtual time.

mod inheritance;
mod newcomers;
mod properties;
mod tenants;
mod throttled;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{sync::watch, time::sleep};

use super::*;
use crate::{
    clock::Clock,
    lifecycle::{self, DrainSignal, Readiness},
    rate::Bucket,
    role::{Claimant, SessionName, WantedRoles},
    telemetry::Statsd,
};

const HOUR: Duration = Duration::from_secs(3600);
/// How long a step of the wall clock may go unnoticed, and a call.
const LOOKS_AGAIN: Duration = Duration::from_secs(16);

/// An account that throttles whatever is asked.
const THROTTLED: &str = "999999999999";

/// Issues at once, or fails while it is told to; counts the calls.
struct Source {
    clock: Clock,
    calls: Mutex<HashMap<RoleIdentity, u32>>,
    /// The pod that each call was made for.
    vouched: Mutex<Vec<String>>,
    failing: AtomicBool,
    denying: AtomicBool,
    /// What throttles, if anything: what is left of a quota that others use too.
    quota: Mutex<Option<(Rate, Bucket)>>,
    life: Duration,
}

impl CredentialSource for Source {
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>> {
        Box::pin(async move {
            sleep(Duration::from_millis(20)).await;
            self.vouched.lock().unwrap().push(claimant.pod.to_string());
            let count = {
                let mut calls = self.calls.lock().unwrap();
                let count = calls.entry(identity.clone()).or_default();
                *count += 1;
                *count
            };
            match identity.role.name() {
                // Without the message that panic! prints.
                "panics" => std::panic::resume_unwind(Box::new("panicked")),
                "hangs" => std::future::pending().await,
                "long" if count < 4 => return Err(too_long()),
                "too-long" => return Err(too_long()),
                _ => {}
            }
            let throttled = identity.role.account() == THROTTLED || !self.take_quota();
            if throttled || self.failing.load(Ordering::Relaxed) {
                let message = "Rate exceeded".to_owned();
                return Err(SourceError { class: ErrorClass::Throttled, message });
            }
            if self.denying.load(Ordering::Relaxed) {
                let message = "AccessDenied".to_owned();
                return Err(SourceError { class: ErrorClass::Denied, message });
            }
            let issued = self.clock.now();
            Ok(Credentials::test(&identity.role, &format!("ASIA{count}"), issued, self.life))
        })
    }
}

impl Source {
    /// Whether the quota has room for a call; one that it has none for takes nothing.
    fn take_quota(&self) -> bool {
        let mut quota = self.quota.lock().unwrap();
        let Some((rate, bucket)) = quota.as_mut() else { return true };
        let now = Instant::now();
        let free = bucket.wait(*rate, now).is_zero();
        if free {
            bucket.take(*rate, now);
        }
        free
    }
}

fn too_long() -> SourceError {
    SourceError::new(ErrorClass::TooLong, "exceeds the MaxSessionDuration set for this role")
}

struct Fixture {
    source: Arc<Source>,
    reader: CredentialReader,
    refresher: Refresher,
    wanted: watch::Sender<WantedRoles>,
    clock: Clock,
    readiness: Readiness,
    registry: Registry,
    /// How long the watch of the pods has been silent.
    silence: Arc<Mutex<Duration>>,
    _drain: DrainSignal,
}

fn identity(role: &str) -> RoleIdentity {
    let role = format!("arn:aws:iam::123456789012:role/{role}").parse().unwrap();
    RoleIdentity::new(role, SessionName::sanitised("kiam-kiam"), HOUR)
}

/// Each role is wanted by a pod of its own.
fn set(roles: &[&str]) -> WantedRoles {
    let wanted = |role: &&str| (identity(role), BTreeSet::from([Claimant::new("shop", role)]));
    Arc::new(roles.iter().map(wanted).collect())
}

fn start(roles: &[&str], failing: bool, life: Duration) -> Fixture {
    start_with(Config::default(), set(roles), failing, life)
}

fn start_with(config: Config, wanted: WantedRoles, failing: bool, life: Duration) -> Fixture {
    let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    begin(config, wanted, source(clock, failing, life), Inheritance::default())
}

fn source(clock: Clock, failing: bool, life: Duration) -> Source {
    Source {
        clock,
        calls: Mutex::default(),
        vouched: Mutex::default(),
        failing: AtomicBool::new(failing),
        denying: AtomicBool::new(false),
        quota: Mutex::default(),
        life,
    }
}

fn begin(config: Config, wanted: WantedRoles, source: Source, inheritance: Inheritance) -> Fixture {
    let (clock, source) = (source.clock.clone(), Arc::new(source));
    let (wanted, receiver) = watch::channel(wanted);
    let readiness = Readiness::default();
    let render = |_: &Credentials| RenderedAnswers {
        role_name: Bytes::new(),
        plain: Bytes::new(),
        extended: Bytes::new(),
    };
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry, Statsd::off());
    let silence: Arc<Mutex<Duration>> = Arc::default();
    let silent = silence.clone();
    let (mut prefetcher, reader) = Prefetcher::new(
        config,
        PrefetcherParts {
            names: Box::new(|_| None),
            source: source.clone(),
            render,
            clock: clock.clone(),
            wanted: receiver,
            silence: Box::new(move || Some(*silent.lock().unwrap())),
            metrics,
            first_pass: readiness.latch("first credentials"),
        },
    );
    prefetcher.inherit(inheritance);
    let refresher = prefetcher.refresher();
    let (signal, drain) = lifecycle::drain();
    tokio::spawn(prefetcher.run(drain));
    Fixture {
        source,
        reader,
        refresher,
        wanted,
        clock,
        readiness,
        registry,
        silence,
        _drain: signal,
    }
}

impl Fixture {
    fn calls(&self, role: &str) -> u32 {
        self.source.calls.lock().unwrap().get(&identity(role)).copied().unwrap_or_default()
    }

    fn all_calls(&self) -> u32 {
        self.source.calls.lock().unwrap().values().sum()
    }

    fn key(&self, role: &str) -> Option<String> {
        match self.reader.get(&identity(role)) {
            Some(State::Ready(issued)) => Some(issued.credentials.access_key_id.clone()),
            _ => None,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn wanted_identities_are_fetched_once_and_renewed_around_half_life() {
    let fixture = start(&["a", "b"], false, HOUR);
    assert!(!fixture.readiness.is_ready());
    sleep(Duration::from_secs(1)).await;
    assert!(fixture.readiness.is_ready());
    assert_eq!((fixture.calls("a"), fixture.calls("b")), (1, 1));
    sleep(Duration::from_secs(23 * 60)).await;
    assert_eq!(fixture.calls("a"), 1);
    sleep(Duration::from_secs(13 * 60)).await;
    assert_eq!(fixture.key("a").as_deref(), Some("ASIA2"));
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_when_the_credentials_come() {
    let fixture = start(&["a"], false, HOUR);
    let state = fixture.reader.wait(&identity("a"), Duration::from_millis(400)).await;
    assert!(matches!(state, Some(State::Ready(_))));
    assert!(fixture.reader.wait(&identity("z"), Duration::from_millis(400)).await.is_none());
    assert_eq!(fixture.calls("z"), 0);
}

#[tokio::test(start_paused = true)]
async fn failed_renewal_keeps_valid_credentials_and_expired_ones_are_never_served() {
    let fixture = start(&["a"], false, HOUR);
    sleep(Duration::from_secs(60)).await;
    fixture.source.failing.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs(58 * 60)).await;
    assert_eq!(fixture.key("a").as_deref(), Some("ASIA1"));
    assert!(fixture.calls("a") > 2);
    sleep(Duration::from_secs(120)).await;
    let state = fixture.reader.get(&identity("a"));
    assert!(matches!(state, Some(State::Failed { .. })));
    fixture.source.failing.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs(180)).await;
    assert!(fixture.key("a").is_some());
}

#[tokio::test(start_paused = true)]
async fn failures_back_off() {
    let fixture = start(&["a"], true, HOUR);
    sleep(Duration::from_secs(600)).await;
    let calls = fixture.calls("a");
    assert!((5..=12).contains(&calls), "{calls}");
}

#[tokio::test(start_paused = true)]
async fn after_a_failure_another_pod_of_those_that_want_it_vouches() {
    let pods = ["a", "b", "c"].map(|pod| Claimant::new("shop", pod));
    let wanted = |pods: &[Claimant]| -> WantedRoles {
        Arc::new([(identity("a"), pods.iter().cloned().collect())].into())
    };
    let fixture = start_with(Config::default(), wanted(&pods), true, HOUR);
    let vouched = || fixture.source.vouched.lock().unwrap().clone();
    while vouched().len() < 4 {
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(vouched()[..4], ["a", "b", "c", "a"]);
    // Who is gone is not asked to.
    fixture.wanted.send_replace(wanted(&pods[1..]));
    let before = vouched().len();
    while vouched().len() < before + 3 {
        sleep(Duration::from_secs(1)).await;
    }
    assert!(!vouched()[before..].contains(&"a".to_owned()), "{:?}", vouched());
}

#[tokio::test(start_paused = true)]
async fn unwanted_identities_are_forgotten_after_a_while() {
    let fixture = start(&["a", "b"], false, HOUR);
    sleep(Duration::from_secs(1)).await;
    fixture.wanted.send_replace(set(&["b"]));
    sleep(Duration::from_secs(30)).await;
    assert!(fixture.key("a").is_some());
    sleep(Duration::from_secs(60)).await;
    assert!(fixture.reader.get(&identity("a")).is_none());
    assert_eq!((fixture.calls("a"), fixture.calls("b")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn clock_that_steps_forward_makes_what_is_held_expire_and_be_renewed_at_once() {
    let fixture = start(&["a"], false, HOUR);
    sleep(Duration::from_secs(60)).await;
    fixture.clock.step(3600);
    assert_eq!(fixture.key("a"), None, "SDKs in the pods would not take it either");
    sleep(LOOKS_AGAIN).await;
    assert_eq!((fixture.key("a").as_deref(), fixture.calls("a")), (Some("ASIA2"), 2));
    // By half an hour: good for half an hour more, and due.
    fixture.clock.step(1800);
    assert_eq!(fixture.key("a").as_deref(), Some("ASIA2"));
    sleep(LOOKS_AGAIN + Duration::from_secs(600)).await;
    assert_eq!((fixture.key("a").as_deref(), fixture.calls("a")), (Some("ASIA3"), 3));
}

#[tokio::test(start_paused = true)]
async fn clock_that_steps_back_puts_off_neither_renewal_nor_end() {
    let fixture = start(&["a"], false, HOUR);
    sleep(Duration::from_secs(60)).await;
    fixture.clock.step(-3600);
    sleep(Duration::from_secs(36 * 60)).await;
    assert_eq!(fixture.key("a").as_deref(), Some("ASIA2"), "renewed when it was due");
    fixture.source.failing.store(true, Ordering::Relaxed);
    fixture.clock.step(-3600);
    sleep(HOUR).await;
    assert_eq!(fixture.key("a"), None, "it has expired, whatever the wall clock says");
}

#[tokio::test(start_paused = true)]
async fn time_until_a_pods_first_credentials_is_measured_once_a_pod() {
    let fixture = start(&["a"], false, HOUR);
    let measured = || {
        let mut text = String::new();
        encode(&mut text, &fixture.registry).unwrap();
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().parse::<f64>().unwrap()
        };
        let (count, sum) =
            ("kiam_credentials_ready_seconds_count", "kiam_credentials_ready_seconds_sum");
        (value(count), (value(sum) * 1000.0).round())
    };
    // Renewed once in that time.
    sleep(Duration::from_secs(40 * 60)).await;
    assert_eq!(measured(), (1.0, 20.0), "milliseconds of a call");
    // A second pod that wants what is held, and a third that waits.
    let mut wanted = WantedRoles::unwrap_or_clone(set(&["a", "b"]));
    wanted.get_mut(&identity("a")).unwrap().insert(Claimant::new("shop", "other"));
    fixture.wanted.send_replace(Arc::new(wanted.clone()));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(measured(), (3.0, 40.0));
    wanted.remove(&identity("b"));
    fixture.wanted.send_replace(Arc::new(wanted));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(measured(), (3.0, 40.0));
}

#[tokio::test(start_paused = true)]
async fn calls_that_panic_and_hang_are_tried_again() {
    let fixture = start(&["panics", "hangs", "a"], false, HOUR);
    sleep(Duration::from_secs(59)).await;
    let failed = |role: &str| match fixture.reader.get(&identity(role)) {
        Some(State::Failed { error, .. }) => error.message.clone(),
        _ => String::new(),
    };
    assert!(failed("panics").contains("panicked"));
    assert!(fixture.key("a").is_some() && !fixture.readiness.is_ready());
    sleep(Duration::from_secs(2)).await;
    assert!(failed("hangs").contains("did not answer"));
    assert!(fixture.readiness.is_ready(), "all have been answered, well or badly");
    sleep(Duration::from_secs(300)).await;
    assert!(fixture.calls("panics") > 2 && fixture.calls("hangs") > 2);
}

#[tokio::test(start_paused = true)]
async fn sessions_that_are_too_long_are_asked_for_again_at_once_as_far_as_the_node_may() {
    let second = Duration::from_secs(1);
    let config = Config { sts_rate: Rate { burst: 2, period: second }, ..Config::default() };
    let fixture = start_with(config, set(&["long"]), false, HOUR);
    sleep(second / 2).await;
    assert_eq!((fixture.calls("long"), fixture.key("long")), (2, None), "the node's burst");
    sleep(second).await;
    assert_eq!(fixture.calls("long"), 3);
    let state = fixture.reader.wait(&identity("long"), second).await;
    assert!(matches!(state, Some(State::Ready(_))), "a request is held for it");
    assert_eq!(fixture.calls("long"), 4);
    // A source that never finds one that is short enough is an error like others.
    let fixture = start(&["too-long"], false, HOUR);
    sleep(60 * second).await;
    assert!((9..=16).contains(&fixture.calls("too-long")), "{}", fixture.calls("too-long"));
    assert!(matches!(fixture.reader.get(&identity("too-long")), Some(State::Failed { .. })));
}

#[tokio::test(start_paused = true)]
async fn renewals_that_fail_are_overdue_by_what_they_met_until_one_succeeds() {
    let fixture = start(&["a", "b"], false, HOUR);
    sleep(Duration::from_secs(60)).await;
    let overdue = || fixture.reader.summary().overdue;
    fixture.source.failing.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs(40 * 60)).await;
    assert_eq!(overdue(), Overdue::default(), "retried, with a third of their life left");
    sleep(Duration::from_secs(10 * 60)).await;
    assert_eq!(overdue(), Overdue { throttled: 2, ..Overdue::default() });
    fixture.source.failing.store(false, Ordering::Relaxed);
    fixture.source.denying.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs(4 * 60)).await;
    assert_eq!(overdue(), Overdue { denied: 2, ..Overdue::default() });
    fixture.source.denying.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs(15 * 60)).await;
    assert_eq!((overdue(), fixture.reader.summary().ready), (Overdue::default(), 2));
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_an_hour_is_not_noticed_and_ends_for_all_but_not_at_once() {
    let names: Vec<String> = (0..100).map(|n| format!("r{n}")).collect();
    let roles: Vec<&str> = names.iter().map(String::as_str).collect();
    let fixture = start(&roles, false, HOUR);
    sleep(Duration::from_secs(60)).await;
    fixture.source.failing.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs(58 * 60)).await;
    assert_eq!(fixture.reader.summary().ready, 100, "nobody has noticed");
    sleep(Duration::from_secs(180)).await;
    assert_eq!(fixture.reader.summary().ready, 0);
    let during = fixture.all_calls();
    assert!(during < 100 * 40, "{during} calls: no storm, either");
    fixture.source.failing.store(false, Ordering::Relaxed);
    let (mut most, mut last) = (0, during);
    for _ in 0..151 {
        sleep(Duration::from_secs(1)).await;
        let now = fixture.all_calls();
        (most, last) = (most.max(now - last), now);
    }
    assert_eq!((fixture.reader.summary().ready, last - during), (100, 100));
    assert!(most <= 10, "{most} in a second");
}

#[tokio::test(start_paused = true)]
async fn what_is_fetched_together_is_renewed_apart() {
    let names: Vec<String> = (0..100).map(|n| format!("r{n}")).collect();
    let roles: Vec<&str> = names.iter().map(String::as_str).collect();
    let fixture = start(&roles, false, HOUR);
    sleep(Duration::from_secs(24 * 60)).await;
    assert_eq!(fixture.all_calls(), 100);
    let mut most = 0;
    for _ in 0..13 {
        let before = fixture.all_calls();
        sleep(Duration::from_secs(60)).await;
        most = most.max(fixture.all_calls() - before);
    }
    assert_eq!(fixture.all_calls(), 200);
    assert!(most <= 25, "{most} of a hundred in one of twelve minutes");
}

#[tokio::test(start_paused = true)]
async fn short_sessions_make_no_storm() {
    let fixture = start(&["a"], false, Duration::from_secs(900));
    sleep(HOUR).await;
    assert!((8..=20).contains(&fixture.calls("a")), "{}", fixture.calls("a"));
}

#[tokio::test(start_paused = true)]
async fn credentials_that_are_expired_on_arrival_are_not_kept() {
    let fixture = start(&["a"], false, Duration::ZERO);
    sleep(Duration::from_secs(2)).await;
    let Some(State::Failed { error, .. }) = fixture.reader.get(&identity("a")) else {
        panic!("kept")
    };
    assert!(error.message.contains("expired"), "{error}");
}
