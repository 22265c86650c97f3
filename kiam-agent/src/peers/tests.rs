//! Every flag of every release has a fate, and only those.

use std::collections::BTreeSet;

use super::*;
use crate::config;

const KIAM_1: &str = "json-log debug level kubeconfig port sync-interval allow-ip-query role-base-arn statsd \
    statsd-interval iptables host host-interface";
const AGENT_2: &str = "json-log level port allow-ip-query statsd statsd-interval iptables host host-interface \
    server-address server-address-refresh gateway-timeout-creation cert key ca prometheus-listen-addr \
    prometheus-sync-interval";
const AGENT_3: &str = "json-log level port allow-ip-query statsd statsd-prefix statsd-interval iptables \
    iptables-remove host host-interface whitelist-route-regexp server-address server-address-refresh \
    gateway-timeout-creation cert key ca prometheus-listen-addr prometheus-sync-interval pprof-listen-addr \
    grpc-keepalive-time-ms grpc-keepalive-timeout-ms grpc-keepalive-permit-without-stream";
const AGENT_4: &str = "json-log level port allow-ip-query iptables iptables-remove host host-interface \
    allow-route-regexp server-address server-address-refresh gateway-timeout-creation cert key ca \
    prometheus-listen-addr prometheus-sync-interval pprof-listen-addr grpc-keepalive-time-duration \
    grpc-keepalive-timeout-duration grpc-keepalive-permit-without-stream";
const SERVER_2: &str = "json-log level statsd statsd-interval fetchers prefetch-buffer-size bind kubeconfig sync \
    role-base-arn role-base-arn-autodetect session session-duration assume-role-arn cert key ca \
    prometheus-listen-addr prometheus-sync-interval";
const SERVER_3: &str = "json-log level statsd statsd-prefix statsd-interval fetchers prefetch-buffer-size bind \
    kubeconfig sync role-base-arn role-base-arn-autodetect session session-duration session-refresh \
    assume-role-arn region cert key ca prometheus-listen-addr prometheus-sync-interval pprof-listen-addr";
const SERVER_4: &str = "json-log level fetchers prefetch-buffer-size bind kubeconfig sync role-base-arn \
    role-base-arn-autodetect session session-duration session-refresh assume-role-arn region \
    disable-strict-namespace-regexp cert key ca prometheus-listen-addr prometheus-sync-interval \
    pprof-listen-addr";
const HEALTH_2: &str = "json-log level server-address server-address-refresh gateway-timeout-creation cert key ca timeout";
const HEALTH_3: &str = "json-log level server-address server-address-refresh gateway-timeout-creation cert key ca \
    timeout grpc-keepalive-time-ms grpc-keepalive-timeout-ms grpc-keepalive-permit-without-stream";
const HEALTH_4: &str = "json-log level server-address server-address-refresh gateway-timeout-creation cert key ca \
    timeout grpc-keepalive-time-duration grpc-keepalive-timeout-duration \
    grpc-keepalive-permit-without-stream";
/// The second half is of versions and forks after 0.10.
const KUBE2IAM: &str = "api-server api-token app-port auto-discover-base-arn auto-discover-default-role \
    backoff-max-elapsed-time backoff-max-interval base-role-arn cache-resync-period debug default-role \
    host-interface host-ip iam-external-id iam-role-key iam-role-session-ttl insecure iptables log-format \
    log-level metadata-addr metrics-port namespace-key namespace-restriction-format namespace-restrictions node \
    resolve-duplicate-cache-ips use-regional-sts-endpoint verbose version \
    assume-role-arn bind-ip cache-sync-attempts eks-cluster-arn eks-cluster-name healthcheck-interval \
    iam-enable-pod-identity-tags iam-role-session-name-key kubeconfig metrics-bind-ip nftables";

/// The releases, with the flags that their sources define.
const RELEASES: [(Program, u8, &str); 11] = [
    (Program::Kiam, 1, KIAM_1),
    (Program::Agent, 2, AGENT_2),
    (Program::Agent, 3, AGENT_3),
    (Program::Agent, 4, AGENT_4),
    (Program::Server, 2, SERVER_2),
    (Program::Server, 3, SERVER_3),
    (Program::Server, 4, SERVER_4),
    (Program::Health, 2, HEALTH_2),
    (Program::Health, 3, HEALTH_3),
    (Program::Health, 4, HEALTH_4),
    (Program::Kube2iam, 0, KUBE2IAM),
];

#[test]
fn every_flag_of_every_release_has_one_fate_and_no_other_flag_has() {
    for (program, major, flags) in RELEASES {
        let release = Releases::of(program, Some(major));
        let expected: BTreeSet<&str> = flags.split_whitespace().collect();
        let rows: Vec<&str> = FLAGS
            .iter()
            .filter(|flag| flag.releases.intersects(release))
            .map(|flag| flag.name)
            .collect();
        let found: BTreeSet<&str> = rows.iter().copied().collect();
        assert_eq!(found, expected, "{program} v{major}");
        assert_eq!(rows.len(), found.len(), "{program} v{major}: a flag has two rows");
    }
}

#[test]
fn fates_name_flags_that_the_agent_has() {
    let ours = config::flag_names();
    let has = |name: &str| ours.iter().any(|our| our == name);
    for flag in &FLAGS {
        let PeerFlag { name, fate, advice, .. } = flag;
        match fate {
            Fate::Kept => assert!(has(name) || *name == "version", "{name}"),
            Fate::Renamed(to) => assert!(has(to), "{name}: {to}"),
            Fate::Unneeded | Fate::NoEqual => {}
        }
        assert_eq!(advice.is_empty(), *fate == Fate::Kept, "{name}: {advice}");
    }
    for name in ["HOST_IP", "AWS_REGION", "AWS_ENDPOINT_URL_STS"] {
        let variable = variable(name).expect(name);
        if let VariableFate::Flag(to) = variable.fate {
            assert!(has(to), "{name}: {to}");
        }
    }
}

#[test]
fn a_flag_that_is_not_the_agents_is_answered_by_its_rows() {
    let ours = config::flag_names();
    for flag in FLAGS.iter().filter(|flag| !ours.iter().any(|our| our == flag.name)) {
        let answer = advice(&format!("--{}", flag.name));
        assert_eq!(answer.is_none(), flag.fate == Fate::Kept, "{}: {answer:?}", flag.name);
    }
    assert_eq!(advice("--no-iptables-remove"), advice("--iptables-remove"));
    let debug = advice("--debug").expect("two programs have it");
    assert!(debug.contains("--level=debug; or use kiam-agent explain"), "{debug}");
    assert_eq!((advice("--nonsense"), advice("nonsense")), (None, None));
    assert!(advice("server").is_some());
}

#[test]
fn releases_are_those_of_a_program_and_a_version() {
    let all: Vec<_> = Releases::of(Program::Server, None).iter().collect();
    assert_eq!(all, [(Program::Server, 2), (Program::Server, 3), (Program::Server, 4)]);
    assert_eq!(Releases::of(Program::Agent, Some(3)), Releases::AGENT_3);
    assert_eq!(Releases::of(Program::Agent, Some(4)), Releases::AGENT_4);
    assert_eq!(Releases::of(Program::Kube2iam, Some(3)), Releases::KUBE2IAM);
    assert_eq!(Releases::of(Program::Health, None), Releases::HEALTH);
    assert!(flag("statsd", Releases::SERVER_3).is_some());
    assert!(flag("statsd", Releases::SERVER_4).is_none());
}
