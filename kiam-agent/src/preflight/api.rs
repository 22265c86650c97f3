//! The Kubernetes API: whether it answers, the agent's rights, and the node's pods.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::time::timeout;

use super::clock::ServerClock;
use crate::{
    cluster::{self, AccessError, Cluster, Right, SyncLatches},
    config::Config,
};
use kiam_core::{
    blocking,
    clock::Clock,
    lifecycle::{self, Readiness},
    pods::{self, NodePods, PodIndex, PodReader},
    preflight::{
        Check,
        Topic::{self, Api, ApiRights, Pods},
    },
    role::Source,
};
use kiam_kernel::{identity::InterfaceAddresses, preflight as kernel};

/// What [`checks`] reports.
pub(super) const TOPICS: &[Topic] = &[Api, ApiRights, Pods];
/// How long the first lists may take.
const SYNC: Duration = Duration::from_secs(15);
/// The second number of the oldest version that the manifest is for.
const OLDEST: u32 = 22;

/// What later checks need.
#[derive(Default)]
pub(super) struct ApiReport {
    /// The server's clock.
    pub(super) clock: Option<ServerClock>,
    /// The cluster, with the records of the node's pods, if they could be listed.
    pub(super) known: Option<KnownPods>,
}

/// The pods, namespaces and ServiceAccounts as the API has them.
pub(super) struct KnownPods {
    pub(super) cluster: Cluster,
    pub(super) reader: PodReader,
    pub(super) metrics: cluster::Metrics,
    pub(super) node_pods: NodePods,
}

/// A right, and what the agent lacks without it.
struct NeededRight {
    right: Right,
    /// What grants it.
    by: &'static str,
    /// Whether the agent works without it.
    optional: bool,
}

/// Asks the API, and fills `report`.
pub(super) async fn checks(
    config: &Config,
    facts: &kernel::Config,
    report: &mut ApiReport,
) -> Vec<Check> {
    let readiness = Readiness::default();
    let cluster = match Cluster::new(config.cluster.clone(), &readiness) {
        Ok(cluster) => cluster,
        Err(error) => {
            let remedy =
                "run preflight in a pod with the agent's ServiceAccount, or set --kubeconfig";
            return unanswered(Check::failed(Api, &error, remedy));
        }
    };
    let version = match cluster.version().await {
        Ok(version) => version,
        Err(error) => return unanswered(unreached(&error)),
    };
    let now = Clock::system().now();
    report.clock = ServerClock::read("the Kubernetes API", version.date.as_deref(), now);
    let (rights, may_list) = rights(config, &cluster).await;
    let mut checks = vec![answers(&version), rights];
    if may_list {
        let (pods, known) = pods(config, facts, cluster, readiness).await;
        checks.push(pods);
        report.known = known;
    } else {
        checks.push(Check::unknown(Pods, "the agent may not list pods", "see api-rights"));
    }
    checks
}

fn unanswered(check: Check) -> Vec<Check> {
    let further = [ApiRights, Pods]
        .map(|topic| Check::unknown(topic, "the Kubernetes API does not answer", "see api"));
    std::iter::once(check).chain(further).collect()
}

fn unreached(error: &AccessError) -> Check {
    Check::fail(
        Api,
        format!("the Kubernetes API can't be asked: {error}"),
        "can the node reach the API server's address? docs/installing.md has proxies and certificates",
    )
}

fn answers(version: &cluster::ServerVersion) -> Check {
    let name = &version.name;
    match version.minor {
        Some(minor) if minor < OLDEST => Check::warn(
            Api,
            format!("it answers, as {name}: deploy/ is for 1.{OLDEST} or newer"),
            format!("upgrade the cluster to Kubernetes 1.{OLDEST}"),
        ),
        _ => Check::ok(Api, format!("it answers, as {name}")),
    }
}

/// The rights that `config` needs.
fn needed(config: &Config) -> Vec<NeededRight> {
    let right = |group, resource, verb, by| NeededRight {
        right: Right { group, resource, verb },
        by,
        optional: group == "events.k8s.io",
    };
    let mut needed = Vec::new();
    for resource in ["pods", "namespaces"] {
        for verb in ["list", "watch"] {
            needed.push(right("", resource, verb, "deploy/clusterrole.yaml"));
        }
    }
    for verb in ["create", "patch"] {
        needed.push(right("events.k8s.io", "events", verb, "deploy/clusterrole.yaml"));
    }
    if config.sts.source == Source::WebIdentity {
        for verb in ["list", "watch"] {
            needed.push(right("", "serviceaccounts", verb, "deploy/web-identity"));
        }
        // The kubelet's rights are decided for each pod.
        if config.sts.token_kubeconfig.is_none() {
            needed.push(right("", "serviceaccounts/token", "create", "deploy/web-identity"));
        }
    }
    if config.cluster.startup_taint.is_some() {
        for verb in ["get", "patch"] {
            needed.push(right("", "nodes", verb, "deploy/startup-taint"));
        }
    }
    if config.cluster.evict_older_pods {
        needed.push(right("", "pods/eviction", "create", "deploy/evict-older-pods"));
    }
    needed
}

/// Asks for each right. Returns also whether the agent may list what it has to.
async fn rights(config: &Config, cluster: &Cluster) -> (Check, bool) {
    let needed = needed(config);
    let asked = needed.iter().map(|needed| cluster.has(needed.right));
    let answers = futures::future::join_all(asked).await;
    let mut lacking = Vec::new();
    for (needed, answer) in needed.iter().zip(answers) {
        match answer {
            Ok(true) => {}
            Ok(false) => lacking.push(needed),
            Err(error) => {
                let finding = format!("the API does not say which rights the agent has: {error}");
                let remedy = "is the agent's token valid? kubectl auth can-i --list --as=system:serviceaccount:kube-system:kiam-agent";
                // The lists show what is missing.
                return (Check::unknown(ApiRights, finding, remedy), true);
            }
        }
    }
    let may_list = lacking.iter().all(|needed| needed.right.verb != "list");
    (judge(&lacking), may_list)
}

fn judge(lacking: &[&NeededRight]) -> Check {
    if lacking.is_empty() {
        return Check::ok(ApiRights, "the agent has all that these flags need");
    }
    let names: Vec<_> = lacking.iter().map(|needed| needed.right.to_string()).collect();
    let mut grants: Vec<_> = lacking.iter().map(|needed| needed.by).collect();
    grants.dedup();
    let (finding, remedy) =
        (format!("missing: {}", names.join(", ")), format!("apply {}", grants.join(" and ")));
    match lacking.iter().all(|needed| needed.optional) {
        true => Check::warn(
            ApiRights,
            format!("{finding}; without Events, the log alone says why a pod gets no credentials"),
            remedy,
        ),
        false => Check::fail(ApiRights, finding, remedy),
    }
}

/// Lists what the agent lists, and compares the node's pods with its cgroups.
async fn pods(
    config: &Config,
    facts: &kernel::Config,
    cluster: Cluster,
    readiness: Readiness,
) -> (Check, Option<KnownPods>) {
    let (index, reader) = PodIndex::with(pods::Config {
        static_pod_namespaces: config.static_pod_namespaces.clone(),
        node: Arc::new(InterfaceAddresses::default()),
    });
    let node_pods = config.node_pods();
    let synced = SyncLatches::new(&readiness, config.sts.source);
    let latches = synced.all();
    let metrics = cluster::Metrics::register(&mut Registry::default());
    let again = match Cluster::new(config.cluster.clone(), &readiness) {
        Ok(again) => again,
        Err(error) => return (Check::failed(Pods, &error, "see api"), None),
    };
    let (_signal, drain) = lifecycle::drain();
    let watching = cluster.run(index, reader.clone(), synced, metrics.clone(), drain);
    let synced = async {
        tokio::select! {
            () = watching => false,
            synced = timeout(SYNC, readiness.wait_for(&latches)) => synced.is_ok(),
        }
    };
    if !synced.await {
        let finding =
            format!("pods and namespaces could not be listed within {} s", SYNC.as_secs());
        return (Check::unknown(Pods, finding, "see api and api-rights"), None);
    }
    let serves = node_pods.filter();
    let known = reader.all().iter().filter(|pod| pod.live && serves(pod)).count();
    let facts = facts.clone();
    let cgroups = blocking::spawn(move |token| kernel::count_pods(token, &facts)).await;
    let check = compare(config.cluster.node_name.as_deref(), known, cgroups.ok().flatten());
    (check, Some(KnownPods { cluster: again, reader, metrics, node_pods }))
}

/// Compares the number of the node's pods in the API with that of pods' cgroups.
fn compare(node: Option<&str>, known: usize, cgroups: Option<usize>) -> Check {
    let of = node.map_or("this --host".to_owned(), |name| format!("node {name}"));
    match (known, cgroups) {
        (0, Some(running)) if running > 0 => Check::fail(
            Pods,
            format!("the API has no pod of {of}, and {running} run here: they would get no role"),
            "set --node-name to the name that `kubectl get nodes` shows, and --host to the address there",
        ),
        (known, Some(running)) => {
            Check::ok(Pods, format!("the API has {known} of {of}; cgroups here: {running}"))
        }
        (known, None) => Check::ok(Pods, format!("the API has {known} of {of}")),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Fail, Ok as Good, Warn};

    use super::*;

    fn right(group: &'static str, resource: &'static str) -> NeededRight {
        let right = Right { group, resource, verb: "create" };
        NeededRight { right, by: "deploy/a", optional: !group.is_empty() }
    }

    #[test]
    fn a_missing_right_is_named_with_what_grants_it() {
        assert_eq!(judge(&[]).verdict, Good);
        let (events, evictions) = (right("events.k8s.io", "events"), right("", "pods/eviction"));
        let check = judge(&[&events]);
        assert_eq!(check.verdict, Warn);
        assert!(check.finding.starts_with("missing: create events.events.k8s.io;"), "{check:?}");
        let check = judge(&[&events, &evictions]);
        assert_eq!(check.verdict, Fail);
        assert!(check.finding.ends_with("create pods/eviction"), "{check:?}");
        assert_eq!(check.remedy.as_deref(), Some("apply deploy/a"));
    }

    #[test]
    fn pods_that_the_api_does_not_have_are_a_failure() {
        for (known, cgroups, verdict) in
            [(0, Some(3), Fail), (0, Some(0), Good), (2, Some(3), Good), (0, None, Good)]
        {
            let check = compare(Some("n1"), known, cgroups);
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
        assert!(compare(None, 0, Some(1)).finding.contains("--host"));
    }

    #[test]
    fn an_old_version_is_a_warning() {
        for (minor, verdict) in [(Some(21), Warn), (Some(22), Good), (None, Good)] {
            let version = cluster::ServerVersion { name: "v1".to_owned(), minor, date: None };
            assert_eq!(answers(&version).verdict, verdict, "{minor:?}");
        }
    }
}
