//! The table of flags. Its facts are those of the programs' sources: `cmd/` of <https://github.com/uswitch/kiam> and
//! <https://github.com/jtblin/kube2iam>, and of kube2iam's forks.

use super::{Fate, PeerFlag, Releases};
use Fate::{Kept, NoEqual, Renamed, Unneeded};

const ALL: Releases = Releases::KIAM_1.and(PARTS).and(Releases::HEALTH);
const PARTS: Releases = Releases::AGENT.and(Releases::SERVER);
const FIRST: Releases = Releases::KIAM_1.and(Releases::AGENT);
const GATEWAY: Releases = Releases::AGENT.and(Releases::HEALTH);
const STATSD: Releases = Releases::KIAM_1.and(Releases::STATSD);
const KEEPALIVE_3: Releases = Releases::AGENT_3.and(Releases::HEALTH_3);
const KEEPALIVE_4: Releases = Releases::AGENT_4.and(Releases::HEALTH_4);
const SERVER_FROM_3: Releases = Releases::SERVER_3.and(Releases::SERVER_4);
const PARTS_FROM_3: Releases = SERVER_FROM_3.and(Releases::AGENT_3).and(Releases::AGENT_4);
const PARTS_OF_3: Releases = Releases::AGENT_3.and(Releases::SERVER_3);
const RULE: Releases = FIRST.and(Releases::KUBE2IAM);
const KUBE2IAM: Releases = Releases::KUBE2IAM;

const NO_SERVER: &str = "there is no server: every node's agent calls STS itself";
const NO_CONNECTION: &str = "there is no connection that needs it";
const STS_RATE: &str = "--sts-rate says how fast credentials are fetched";
const ALLOW_PATH: &str = "use --allow-path, once for each path";
const NO_DEFAULT_ROLE: &str = "there is no default role: annotate pods, or use --node-role";
const KUBECONFIG: &str = "use --kubeconfig, or the pod's service account";
const HOLD: &str = "use --hold, which says how long a request waits for its pod";

/// Every flag of kiam v1 to v4 and of kube2iam.
pub static FLAGS: [PeerFlag; 80] = [
    switch("json-log", ALL, Kept, ""),
    flag("level", ALL, Kept, ""),
    switch("debug", Releases::KIAM_1, Renamed("level"), "use --level=debug"),
    flag("kubeconfig", Releases::KIAM_1.and(Releases::SERVER).and(KUBE2IAM), Kept, ""),
    flag("port", FIRST, Kept, ""),
    flag("sync-interval", Releases::KIAM_1, Kept, ""),
    switch("allow-ip-query", FIRST, Kept, ""),
    flag("role-base-arn", Releases::KIAM_1.and(Releases::SERVER), Kept, ""),
    switch("role-base-arn-autodetect", Releases::SERVER, Kept, ""),
    flag("host", FIRST, Kept, ""),
    switch("iptables", RULE, Unneeded, "the kernel's own hooks intercept"),
    flag("host-interface", RULE, Unneeded, "the kernel's own hooks intercept"),
    switch(
        "iptables-remove",
        Releases::AGENT_3.and(Releases::AGENT_4),
        Unneeded,
        "run kiam-agent uninstall to stop intercepting",
    ),
    flag("whitelist-route-regexp", Releases::AGENT_3, Renamed("allow-path"), ALLOW_PATH),
    flag("allow-route-regexp", Releases::AGENT_4, Renamed("allow-path"), ALLOW_PATH),
    flag("server-address", GATEWAY, Unneeded, NO_SERVER),
    flag("server-address-refresh", GATEWAY, Unneeded, NO_SERVER),
    flag("gateway-timeout-creation", GATEWAY, Unneeded, "there is no gateway"),
    flag("cert", PARTS.and(Releases::HEALTH), Unneeded, NO_CONNECTION),
    flag("key", PARTS.and(Releases::HEALTH), Unneeded, NO_CONNECTION),
    flag("ca", PARTS.and(Releases::HEALTH), Unneeded, NO_CONNECTION),
    flag("grpc-keepalive-time-ms", KEEPALIVE_3, Unneeded, NO_CONNECTION),
    flag("grpc-keepalive-timeout-ms", KEEPALIVE_3, Unneeded, NO_CONNECTION),
    flag("grpc-keepalive-time-duration", KEEPALIVE_4, Unneeded, NO_CONNECTION),
    flag("grpc-keepalive-timeout-duration", KEEPALIVE_4, Unneeded, NO_CONNECTION),
    switch(
        "grpc-keepalive-permit-without-stream",
        KEEPALIVE_3.and(KEEPALIVE_4),
        Unneeded,
        NO_CONNECTION,
    ),
    flag("timeout", Releases::HEALTH, Unneeded, "kiam-agent status waits for 5 s"),
    flag("prometheus-listen-addr", PARTS, Renamed("metrics"), "use --metrics"),
    flag("prometheus-sync-interval", PARTS, Unneeded, "metrics are read at each scrape"),
    flag("pprof-listen-addr", PARTS_FROM_3, Unneeded, "there is no profiler"),
    flag("statsd", STATSD, Kept, ""),
    flag("statsd-interval", STATSD, Kept, ""),
    flag("statsd-prefix", PARTS_OF_3, NoEqual, "the prefix is kiam"),
    flag("fetchers", Releases::SERVER, Unneeded, STS_RATE),
    flag("prefetch-buffer-size", Releases::SERVER, Unneeded, STS_RATE),
    flag("bind", Releases::SERVER, Unneeded, NO_SERVER),
    flag("sync", Releases::SERVER, Renamed("sync-interval"), "use --sync-interval"),
    flag(
        "session",
        Releases::SERVER,
        Renamed("session-name"),
        "use --session-name, with kiam- in front, which that kiam added",
    ),
    flag("session-duration", Releases::SERVER, Kept, ""),
    flag(
        "session-refresh",
        SERVER_FROM_3,
        Unneeded,
        "credentials are renewed at about half their life",
    ),
    flag("assume-role-arn", Releases::SERVER.and(KUBE2IAM), Kept, ""),
    flag("region", SERVER_FROM_3, Kept, ""),
    switch(
        "disable-strict-namespace-regexp",
        Releases::SERVER_4,
        NoEqual,
        "expressions always match whole names",
    ),
    flag("base-role-arn", KUBE2IAM, Renamed("role-base-arn"), "use --role-base-arn"),
    switch(
        "auto-discover-base-arn",
        KUBE2IAM,
        Renamed("role-base-arn-autodetect"),
        "use --role-base-arn-autodetect",
    ),
    switch("auto-discover-default-role", KUBE2IAM, NoEqual, NO_DEFAULT_ROLE),
    flag("default-role", KUBE2IAM, NoEqual, NO_DEFAULT_ROLE),
    flag("host-ip", KUBE2IAM, Renamed("host"), "use --host"),
    flag("bind-ip", KUBE2IAM, Renamed("host"), "use --host"),
    flag("node", KUBE2IAM, Renamed("node-name"), "use --node-name"),
    flag("app-port", KUBE2IAM, Renamed("port"), "use --port"),
    flag("metrics-port", KUBE2IAM, Renamed("metrics"), "use --metrics"),
    flag("metrics-bind-ip", KUBE2IAM, Renamed("metrics"), "use --metrics"),
    flag("log-level", KUBE2IAM, Renamed("level"), "use --level"),
    flag("log-format", KUBE2IAM, Renamed("json-log"), "use --json-log"),
    switch("verbose", KUBE2IAM, Renamed("level"), "use --level=debug"),
    flag(
        "iam-role-session-ttl",
        KUBE2IAM,
        Renamed("session-duration"),
        "use --session-duration, with twice the value, which is what kube2iam asks STS for",
    ),
    flag("iam-role-key", KUBE2IAM, NoEqual, "the annotation is iam.amazonaws.com/role"),
    flag("namespace-key", KUBE2IAM, NoEqual, "the annotation is iam.amazonaws.com/allowed-roles"),
    flag("iam-external-id", KUBE2IAM, NoEqual, "the annotation is iam.amazonaws.com/external-id"),
    flag(
        "iam-role-session-name-key",
        KUBE2IAM,
        NoEqual,
        "the annotation is iam.amazonaws.com/session-name",
    ),
    switch(
        "namespace-restrictions",
        KUBE2IAM,
        Renamed("namespace-policy"),
        "use --namespace-policy=required",
    ),
    flag(
        "namespace-restriction-format",
        KUBE2IAM,
        NoEqual,
        "put expressions into iam.amazonaws.com/permitted",
    ),
    switch("use-regional-sts-endpoint", KUBE2IAM, Unneeded, "the region's own STS is always used"),
    flag("metadata-addr", KUBE2IAM, Renamed("upstream"), "use --upstream"),
    switch("insecure", KUBE2IAM, NoEqual, "--kubeconfig names the server and its certificate"),
    flag("api-server", KUBE2IAM, Unneeded, KUBECONFIG),
    flag("api-token", KUBE2IAM, Unneeded, KUBECONFIG),
    switch(
        "debug",
        KUBE2IAM,
        Unneeded,
        "use kiam-agent explain, and /pods on the socket in --state-dir",
    ),
    switch("iam-enable-pod-identity-tags", KUBE2IAM, Renamed("session-tags"), "use --session-tags"),
    flag("eks-cluster-name", KUBE2IAM, Renamed("cluster-name"), "use --cluster-name"),
    flag(
        "eks-cluster-arn",
        KUBE2IAM,
        Renamed("session-tags"),
        "use --cluster-name; --session-tags=eks-cluster-arn=ARN adds the ARN",
    ),
    flag("cache-resync-period", KUBE2IAM, Renamed("sync-interval"), "use --sync-interval"),
    flag(
        "cache-sync-attempts",
        KUBE2IAM,
        Unneeded,
        "the agent is not ready until everything is listed, and retries",
    ),
    switch(
        "resolve-duplicate-cache-ips",
        KUBE2IAM,
        Unneeded,
        "the kernel attests the calling pod, whatever its address",
    ),
    flag("backoff-max-interval", KUBE2IAM, Unneeded, HOLD),
    flag("backoff-max-elapsed-time", KUBE2IAM, Unneeded, HOLD),
    flag(
        "healthcheck-interval",
        KUBE2IAM,
        Unneeded,
        "use kiam-agent status, or /live and /ready at --admin",
    ),
    switch("nftables", KUBE2IAM, Unneeded, "the kernel's own hooks intercept"),
    switch("version", KUBE2IAM, Kept, ""),
];

const fn flag(
    name: &'static str,
    releases: Releases,
    fate: Fate,
    advice: &'static str,
) -> PeerFlag {
    PeerFlag { name, releases, switch: false, fate, advice }
}

const fn switch(
    name: &'static str,
    releases: Releases,
    fate: Fate,
    advice: &'static str,
) -> PeerFlag {
    PeerFlag { name, releases, switch: true, fate, advice }
}
