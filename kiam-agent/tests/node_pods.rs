//! The whole agent on a lab node: pods that are told apart by more than their address.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};

use lab::{
    Agent, Cgroup, Layout, NODE_NAME, PodSpec, client_binary,
    fake::{
        imds::{NODE_ACCESS_KEY, NODE_ROLE},
        kubernetes::{NamespaceRecord, PodRecord, Resource},
    },
    pod_client::{Attempt, Imds, Options},
    role_arn, tells_namespaces_apart,
};
use tokio::time::Instant;

const READY_LIMIT: Duration = Duration::from_secs(120);

#[test]
fn pods_of_a_node_role_have_the_nodes_and_reach_it_through_the_agent_alone() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&["--node-role=kube-system/csi", "--node-role=kube-system/other"]);
    let spec = |namespace: &str, name: &str| PodSpec::new(namespace, name).role("orders");
    let csi = lab.pod(spec("kube-system", "csi-1").service_account("csi")).unwrap();
    for imds in [Imds::V2, Imds::V1] {
        let attempt = csi.ask_once(&Options { imds, ..Options::default() }).unwrap();
        assert_eq!(attempt.role.as_deref(), Some(NODE_ROLE), "{attempt:?}");
        assert_eq!(attempt.field("AccessKeyId").as_deref(), Some(NODE_ACCESS_KEY), "{attempt:?}");
    }
    assert!(csi.get("/latest/user-data").unwrap().body.contains("secret"));
    // The same service account elsewhere, and another one there.
    let others = [spec("shop", "csi-2").service_account("csi"), spec("kube-system", "proxy")];
    for spec in others {
        let pod = lab.pod(spec).unwrap();
        lab.assert_served(&pod, "orders");
        assert_eq!(pod.get("/latest/user-data").unwrap().status, Some(404));
    }
    let packets = lab.imds.packets();
    assert!(csi.ips().iter().all(|ip| !packets.contains_key(ip)), "{packets:?}");
    let log = agent.log();
    assert_eq!(log.matches("Connections are passed on").count(), 1, "once for a pod");
    let metrics = agent.metrics();
    assert!(metrics.contains("kiam_serve_relays_total{outcome=\"Closed\"}"), "{metrics}");
}

#[test]
fn a_host_network_pod_that_is_intercepted_has_its_own_role() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&["--host-network-pods=intercept", "--node-role=kube-system/cni"]);
    let host_pod = |namespace: &str, name: &str| PodSpec::new(namespace, name).host_network();
    let orders = lab.pod(host_pod("shop", "orders").role("orders")).unwrap();
    let reports = lab.pod(host_pod("shop", "reports").role("reports")).unwrap();
    let spec = host_pod("kube-system", "cni").role("orders").service_account("cni");
    let cni = lab.pod(spec).unwrap();
    for _ in 0..3 {
        lab.assert_served(&orders, "orders");
        lab.assert_served(&reports, "reports");
        let attempt = cni.credentials().unwrap();
        assert_eq!(attempt.field("AccessKeyId").as_deref(), Some(NODE_ACCESS_KEY), "{attempt:?}");
    }
}

#[test]
fn a_pod_that_the_watch_did_not_show_is_found_by_a_list_once_a_second() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&["--sync-interval=1h"]);
    lab.kubernetes.stall_watches(true);
    let store = lab.kubernetes.store();
    let before = store.lists(Resource::Pods);
    // Nobody ever tells of this one.
    let spec = PodSpec::new("shop", "ghost").role("orders").with_uid().unwrap();
    let ghost = lab.node.pod(spec).unwrap();
    let begun = Instant::now();
    let attempts =
        ghost.ask(&Options { for_ms: Some(2500), imds: Imds::V1, ..Options::default() }).unwrap();
    assert!(attempts.len() >= 5, "{attempts:?}");
    assert!(attempts.iter().all(|attempt| attempt.status == Some(404)), "{attempts:?}");
    let lists = store.lists(Resource::Pods) - before;
    let most = usize::try_from(begun.elapsed().as_secs()).unwrap() + 2;
    assert!((2..=most).contains(&lists), "{lists} lists, {} attempts", attempts.len());
    // This one's namespace is known, and it is held until the list is there.
    lab.kubernetes.stall_watches(false);
    let known = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    lab.assert_served(&known, "orders");
    lab.kubernetes.stall_watches(true);
    let spec = PodSpec::new("shop", "reports").role("reports");
    let late = lab.unpublished_pod(spec).unwrap();
    if !tells_namespaces_apart().unwrap() {
        // Its address is all that says that the network namespace is the pod's.
        lab.publish(&late);
    }
    let until = Instant::now() + READY_LIMIT;
    let mut attempt = late.credentials().unwrap();
    while attempt.status != Some(200) && Instant::now() < until {
        attempt = late.credentials().unwrap();
    }
    lab.assert_role(&attempt, "reports");
}

#[test]
fn cgroups_that_no_kubelet_made_are_no_pods() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let victim = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    lab.assert_served(&victim, "orders");
    let thief = lab.pod(PodSpec::new("shop", "thief").role("reports")).unwrap();
    for layout in [Layout::SystemdBurstable, Layout::SystemdGuaranteed, Layout::CgroupfsBurstable] {
        // Beside the kubelet's, with the victim's UID below, as a runtime of another kind might.
        let beside = lab.node.kubepods().join("\u{1b}[2Jbuilds");
        let disguise =
            Cgroup::create(beside.join(layout.container(victim.uid(), "c0ffee"))).unwrap();
        let attempt = thief.ask_in(&disguise, &Options::default()).unwrap();
        match tells_namespaces_apart().unwrap() {
            true => assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{attempt:?}"),
            // The agent finds out what the kernel can't.
            false => assert_eq!(attempt.status, Some(403), "{attempt:?}"),
        }
        drop(disguise);
        Cgroup::create(beside).map(drop).unwrap();
    }
    lab.assert_served(&thief, "reports");
}

/// Opens `count` connections to the service, says how many there are, and holds them until its input ends.
const HOLD: &str = r#"ulimit -n 4096
open=0
for _ in $(seq "$0"); do
  exec {fd}<>/dev/tcp/169.254.169.254/80 && open=$((open + 1))
done 2>/dev/null
echo "$open"
read -r _
"#;

/// Connections that the agent has closed because there were too many.
fn rejected(agent: &Agent) -> u64 {
    let metrics = agent.metrics();
    let counts = metrics.lines().filter_map(|line| {
        let (reason, count) = line.strip_prefix("kiam_serve_rejected_total")?.split_once(' ')?;
        reason.contains("Connections").then(|| count.parse::<u64>().unwrap())
    });
    counts.sum()
}

#[test]
fn connections_that_a_pod_holds_are_limited_and_no_others_trouble() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&["--host-network-pods=intercept"]);
    let host_pod = |name: &str| PodSpec::new("shop", name).role(name).host_network();
    let flooding = [
        lab.pod(PodSpec::new("shop", "flood").role("flood")).unwrap(),
        lab.pod(host_pod("host-flood")).unwrap(),
    ];
    let others = [
        lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap(),
        lab.pod(host_pod("reports")).unwrap(),
    ];
    for (pod, role) in others.iter().zip(["orders", "reports"]) {
        lab.assert_served(pod, role);
    }
    // Their QoS class came with them; until it is marked, its pods share a quota.
    agent.wait_said("Cgroups of QoS classes marked", READY_LIMIT).unwrap();
    let mut floods = Vec::new();
    for pod in &flooding {
        let mut command = pod.command("bash").unwrap();
        command.args(["-c", HOLD, "900"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        floods.push(command.spawn().unwrap());
    }
    let mut beyond = 0;
    for flood in &mut floods {
        let mut opened = String::new();
        BufReader::new(flood.stdout.as_mut().unwrap()).read_line(&mut opened).unwrap();
        let opened: u64 = opened.trim().parse().unwrap();
        assert_eq!(opened, 256, "the kernel's quota");
        beyond += opened - 192;
    }
    for _ in 0..5 {
        for (pod, role) in others.iter().zip(["orders", "reports"]) {
            lab.assert_served(pod, role);
        }
    }
    // 192 of each stay at the agent; those beyond take the places of the oldest that are idle, or are closed. Silent ones
    // inside a pod are accepted after about a second.
    let until = Instant::now() + READY_LIMIT;
    while rejected(&agent) < beyond && Instant::now() < until {
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(rejected(&agent), beyond);
    let lines = agent.log().matches("Too many connections").count();
    assert!(lines < 50 && (lines > 0) == (beyond > 0), "{lines}");
    for mut flood in floods {
        drop(flood.stdin.take());
        flood.wait().unwrap();
    }
    for (pod, role) in flooding.iter().zip(["flood", "host-flood"]) {
        let until = Instant::now() + READY_LIMIT;
        let mut attempt = pod.credentials().unwrap();
        while attempt.status != Some(200) && Instant::now() < until {
            attempt = pod.credentials().unwrap();
        }
        lab.assert_role(&attempt, role);
    }
}

#[test]
fn static_pods_are_known_by_their_mirrors_where_the_operator_has_them() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&["--static-pod-namespaces=kube-system,node-system"]);
    // The kubelet names the cgroup after its hash of the manifest; the API gives the mirror a UID of its own.
    let cast = [
        ("node-system", "registry", "5f6c3a1b2d4e5f60718293a4b5c6d7e8", 200),
        ("shop", "forger", "6f6c3a1b2d4e5f60718293a4b5c6d7e8", 404),
    ];
    for (n, (namespace, name, hash, status)) in cast.into_iter().enumerate() {
        let mut spec = PodSpec::new(namespace, name);
        spec.uid = Some(hash.to_owned());
        let pod = lab.node.pod(spec).unwrap();
        lab.kubernetes.ensure_namespace(&NamespaceRecord::new(namespace));
        let uid = format!("0f8fad5b-d9cb-469f-a165-70867728950{n}");
        let mirror = PodRecord::scheduled(namespace, name, &uid, NODE_NAME)
            .annotation("kubernetes.io/config.mirror", hash)
            .annotation("kubernetes.io/config.hash", hash)
            .role(name)
            .running(&pod.ips());
        lab.kubernetes.apply_pod(&mirror);
        let known = format!("kiam_cluster_pods {}\n", n + 1);
        let until = Instant::now() + READY_LIMIT;
        while !agent.metrics().contains(&known) {
            assert!(Instant::now() < until, "{name} does not get known");
        }
        let mut attempt = pod.credentials().unwrap();
        // A pod is denied in its first milliseconds, until its network namespace is known.
        while attempt.error.as_deref() == Some("EPERM") && Instant::now() < until {
            attempt = pod.credentials().unwrap();
        }
        assert_eq!(attempt.status, Some(status), "{attempt:?}");
        assert_eq!(lab.role_of(&attempt), (status == 200).then(|| role_arn(name)));
    }
}

/// Goes down from the cgroup `$1`, `$2` levels of the name `$3`, and runs the rest there.
const DESCEND: &str = r#"set -e
cd -P "$1"; depth=$2; name=$3; shift 3
while [ $depth -gt 0 ]; do mkdir -p "$name"; cd -P "$name"; depth=$((depth - 1)); done
echo 0 > cgroup.procs
exec "$@"
"#;

/// Cgroups below this one, deeper than a path can say; they go from the inside.
struct Depths<'a>(&'a Path);

impl Drop for Depths<'_> {
    fn drop(&mut self) {
        let mut find = std::process::Command::new("find");
        find.arg(self.0).args(["-mindepth", "1", "-depth", "-type", "d"]);
        let removed = find.args(["-execdir", "rmdir", "{}", ";"]).status().unwrap();
        assert!(removed.success() || thread::panicking());
    }
}

#[test]
fn a_cgroup_whose_path_is_too_long_refuses_its_own_processes_alone() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let victim = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let deep = lab.pod(PodSpec::new("shop", "deep").role("reports")).unwrap();
    lab.assert_served(&victim, "orders");
    let disguise =
        format!("kubepods-pod{}.slice{}", victim.uid().replace('-', "_"), "x".repeat(180));
    let _depths = Depths(deep.cgroup().path());
    for (depth, status) in [("3", 200), ("24", 403)] {
        let mut command = deep.netns().command("bash");
        command.args(["-c", DESCEND, "descend"]).arg(deep.cgroup().path());
        command.args([depth, &disguise]).arg(client_binary().unwrap()).args(["pod-client", "ask"]);
        let output = command.args(Options::default().to_args()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let attempt: Attempt = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(attempt.status, Some(status), "{attempt:?}");
        assert_eq!(lab.role_of(&attempt), (status == 200).then(|| role_arn("reports")));
        lab.assert_served(&victim, "orders");
        lab.assert_served(&deep, "reports");
    }
    assert!(agent.log().contains("File name too long"), "it says why");
}
