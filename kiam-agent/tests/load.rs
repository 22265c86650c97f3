//! The whole agent under load on a lab node: twelve pods, two threads each, that ask nearly as often as a pod may, with a new
//! connection for every request, across take-overs. None may fail, none may get what is another's, none may reach the real metadata service.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use lab::{
    Lab, LabPod, PodSpec,
    pod_client::{Imds, Options, Tally},
    role_arn,
};
use tokio::time::Instant;

/// In all; more where the take-overs take longer.
const CONNECTIONS: u32 = 100_000;
const THREADS: u32 = 2;
/// What keeps a pod's threads, both together, within its share.
const PAUSE_MS: u64 = 10;
const ROLES: [&str; 12] = [
    "orders", "reports", "invoices", "search", "billing", "mail", "audit", "export", "images",
    "quotes", "returns", "stock",
];
const TAKEOVERS: u32 = 20;

const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";

#[test]
fn under_load_and_across_takeovers_each_connection_gets_its_own_credentials() {
    if lab::skip!() {
        return;
    }
    under_load("--path=auto");
}

#[test]
fn under_load_and_across_takeovers_the_nodes_path_does_the_same() {
    if lab::skip!() {
        return;
    }
    under_load("--path=node");
}

fn under_load(path: &str) {
    let lab = Lab::start().unwrap();
    let mut agent = lab.agent(&[path]);
    let pods = ROLES.map(|role| pod(&lab, role));
    let started = Instant::now();
    let asking = ROLES.map(|role| Options {
        imds: Imds::V1,
        repeat: CONNECTIONS.div_ceil(ROLES.len() as u32 * THREADS),
        pause_ms: PAUSE_MS,
        headers: vec!["Connection: close".to_owned()],
        ..Options::get(&format!("{CREDENTIALS}{role}"))
    });
    let asking: Vec<_> = pods
        .iter()
        .zip(&asking)
        .map(|(pod, options)| pod.ask_from(THREADS, options).unwrap())
        .collect();
    for _ in 0..TAKEOVERS {
        let next = lab.agent(&[path]);
        agent.terminate().unwrap();
        agent = next;
    }
    let taken_over = started.elapsed();
    let tallies: Vec<Tally> = asking.into_iter().map(|asking| asking.finish().unwrap()).collect();
    let took = started.elapsed();

    let attempts: u64 = tallies.iter().map(Tally::attempts).sum();
    let slowest = tallies.iter().map(|tally| tally.slowest_micros).max().unwrap();
    println!(
        "{path}: {attempts} connections in {:.1} s, the slowest {} ms; {TAKEOVERS} take-overs in {:.1} s",
        took.as_secs_f64(),
        slowest / 1000,
        taken_over.as_secs_f64(),
    );
    assert!(attempts >= CONNECTIONS.into());
    let packets = lab.imds.packets();
    for ((pod, role), tally) in pods.iter().zip(ROLES).zip(&tallies) {
        assert!(tally.failures.is_empty(), "{role}: {:?}", tally.failures);
        for key in tally.keys.keys() {
            let owner = lab.sts.owner(key).map(|issued| issued.role);
            assert_eq!(owner, Some(role_arn(role)), "{role} got {key}");
        }
        for address in pod.ips() {
            assert_eq!(
                packets.get(&address),
                None,
                "packets of {address} got to IMDS: {packets:?}"
            );
        }
    }
}

/// One that has been answered, with ports enough for its share of connections within a minute.
fn pod(lab: &Lab, role: &str) -> LabPod {
    let pod = lab.pod(PodSpec::new("shop", role).role(role)).unwrap();
    pod.netns().sysctl("ipv4/ip_local_port_range", "1024 65535").unwrap();
    lab.assert_served(&pod, role);
    pod
}
