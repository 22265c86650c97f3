//! Each fault of a real agent, and the alerts that it fires.

use std::{thread, time::Duration};

use kiam_kernel::pins::AttachLock;
use lab::{
    Lab, LabPod, PodSpec,
    fake::Injected,
    pod_client::{Imds, Options},
    prometheus::Prometheus,
};
use tokio::time::Instant;

use super::{LIMIT, watch};

/// An alert for whose fault a test would wait for ten minutes, with a lower bound.
const SILENT: [(&str, &str, &str); 1] = [("KiamApiSilent", "> 300", "> 20")];
/// An alert for whose fault a test would need a thousand pods.
const FULL: [(&str, &str, &str); 1] = [("KiamNodeNearlyFull", "0.9 * 1024", "0.9")];

/// Waits until all of `alerts` have fired, doing `work` meanwhile. Returns all that have fired by then.
fn fire(prometheus: &Prometheus, alerts: &[&str], mut work: impl FnMut()) -> Vec<String> {
    let began = Instant::now();
    let mut fired: Vec<String> = Vec::new();
    loop {
        work();
        fired.extend(prometheus.firing().unwrap());
        fired.sort();
        fired.dedup();
        let silent: Vec<_> =
            alerts.iter().filter(|it| !fired.iter().any(|had| had == *it)).collect();
        if silent.is_empty() {
            return fired;
        }
        let now = prometheus.query("{__name__=~\"kiam_.*\"}").unwrap();
        assert!(began.elapsed() < LIMIT, "no {silent:?}, but {fired:?}: {now:#?}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// Whether these tests were not asked for.
fn is_left_out() -> bool {
    let left_out = std::env::var_os("KIAM_TEST_ALERTS").is_none();
    if left_out {
        eprintln!("skipped: takes minutes: cargo xtask test dashboards");
    }
    left_out
}

fn pod(lab: &Lab, name: &str) -> LabPod {
    lab.pod(PodSpec::new("shop", name).role(name)).unwrap()
}

fn ask(pod: &LabPod) {
    drop(pod.ask_once(&Options::default()).unwrap());
}

#[test]
fn faults_of_sts_and_the_api_fire_their_alerts() {
    if is_left_out() {
        return;
    }
    let Some(lab) = lab::node_test!() else { return };
    let Some(package) = lab::prometheus::package("dashboards::faults") else { return };
    let mut agent = lab.agent(&["--hold=1s"]);

    // What one tenant's role does wrong is no page.
    let prometheus = watch(&package, &lab, &[]);
    let denied = Injected::refuse(403, "AccessDenied").field("RoleArn", &lab::role_arn("denied"));
    let denied = lab.sts.faults().inject(denied);
    let tenant = pod(&lab, "denied");
    let fired = fire(&prometheus, &["KiamCredentialsDenied"], || ask(&tenant));
    let pages = lab::monitoring::alerts();
    let pages = pages.iter().filter(|alert| alert.severity == "critical");
    let pages: Vec<_> = pages.filter(|alert| fired.contains(&alert.name)).collect();
    assert!(pages.is_empty(), "{pages:?}");
    denied.lift();
    drop((prometheus, tenant));

    let prometheus = watch(&package, &lab, &[]);
    let throttles = lab.sts.faults().inject(Injected::refuse(400, "Throttling"));
    let newcomer = pod(&lab, "throttled");
    fire(&prometheus, &["KiamStsThrottled"], || ask(&newcomer));
    throttles.lift();
    drop((prometheus, newcomer));

    // Sessions that are overdue after half a minute.
    lab.sts.set_session_length(Some(Duration::from_secs(40)));
    let cached = pod(&lab, "orders");
    lab.eventually_served(&cached, "orders");
    let prometheus = watch(&package, &lab, &SILENT);
    lab.sts.stop();
    let newcomer = pod(&lab, "newcomer");
    let all = [
        "KiamStsGivesNothing",
        "KiamStsDown",
        "KiamCredentialsFail",
        "KiamFirstRequestsFail",
        "KiamCredentialsExpiring",
    ];
    fire(&prometheus, &all, || ask(&newcomer));
    lab.sts.restart().unwrap();
    lab.kubernetes.stop();
    fire(&prometheus, &["KiamApiFailing", "KiamApiSilent"], || ());

    let before = prometheus.firing().unwrap();
    assert!(!before.contains("KiamMetricsMissing"), "{before:?}");
    agent.kill().unwrap();
    fire(&prometheus, &["KiamMetricsMissing"], || ());
}

#[test]
fn faults_of_the_node_fire_their_alerts() {
    if is_left_out() {
        return;
    }
    let Some(lab) = lab::node_test!() else { return };
    let Some(package) = lab::prometheus::package("dashboards::faults") else { return };
    // Older than the agent, and with another way out than the node's stack.
    let older = pod(&lab, "older");
    let imds = lab.node.imds_netns();
    let way = format!("link add way type veth peer name way netns {}", imds.path());
    older.netns().ip(&way).unwrap();
    older.netns().ip("link set way up\nroute add 169.254.169.254 dev way").unwrap();
    imds.ip(&format!("link set way up\nroute add {} dev way", older.v4())).unwrap();
    let agent = lab.agent(&["--boot-guard=/proc/sys", "--selftest-interval=10m"]);
    let prometheus = watch(&package, &lab, &FULL);
    let all = [
        "KiamGuardOpen",
        "KiamBootGuardFails",
        "KiamOlderPods",
        "KiamSelfTestStale",
        "KiamNodeNearlyFull",
    ];
    fire(&prometheus, &all, || ());
    drop((prometheus, older, agent));

    let agent = lab.agent(&["--selftest-interval=1s"]);
    let orders = pod(&lab, "orders");
    lab.eventually_served(&orders, "orders");
    let prometheus = watch(&package, &lab, &FULL);
    let mut quiet = fire(&prometheus, &["KiamNodeNearlyFull"], || ask(&orders));
    // The agent may not have tried the guard from a pod yet.
    quiet.retain(|alert| alert != "KiamGuardUnknown");
    assert_eq!(quiet, ["KiamNodeNearlyFull"], "the faults below have not begun");
    let link = |name: &str| lab.pins().join("v2").join(name);
    lab.node.detach_link(&link("link_kiam_connect4")).unwrap();
    lab.node.netns().ip("rule del protocol 107").unwrap();
    let forged = Options {
        headers: vec!["X-Forwarded-For: 10.0.0.1".to_owned()],
        imds: Imds::V1,
        repeat: 20,
        ..Options::default()
    };
    let denied = Options { port: 8080, repeat: 200, ..Options::connect() };
    let loose = PodSpec::new("shop", "loose").role("orders");
    lab.publish_of(&lab.schedule(loose).unwrap(), &["10.77.1.250".parse().unwrap()]);
    let all = [
        "KiamProgramsTakenAway",
        "KiamGuardRemoved",
        "KiamForgedRequests",
        "KiamDeniedSpike",
        "KiamPodsUnseen",
    ];
    fire(&prometheus, &all, || {
        drop(orders.ask(&forged).unwrap());
        drop(orders.ask(&denied).unwrap());
    });
    // While another agent attaches its programs, this one puts nothing back at once.
    let lock = AttachLock::take(&lab.pins()).unwrap().unwrap();
    fire(&prometheus, &["KiamSelfTestFails", "KiamAgentNotReady"], || {
        lab.node.detach_link(&link("link_kiam_sendmsg4")).unwrap();
    });
    drop((lock, prometheus, agent));

    let _agent = lab.agent(&["--guard=none"]);
    fire(&watch(&package, &lab, &FULL), &["KiamGuardMissing"], || ());
}
