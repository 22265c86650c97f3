//! The whole report: what the node is like afterwards, how long it takes, and what it keeps to itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use kiam_core::preflight::Topic;
use lab::{
    Agent, Lab, LabPod, Netns, PodSpec, agent_binary, fake::Injected, programs_at, role_arn,
};

use super::run::{Played, Setting};

/// More than a busy machine needs for checks of which each hangs until its deadline.
const LIMIT: Duration = Duration::from_secs(100);
/// With every part that can be tried.
const ALL: [&str; 2] = ["--guard=route,skb,uplink", "--evict-older-pods"];

fn pod(lab: &Lab) -> LabPod {
    lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap()
}

/// What commands print in a network namespace.
fn printed(netns: &Netns, commands: &[&str]) -> String {
    let mut all = String::new();
    for command in commands {
        let mut words = command.split(' ');
        let output = netns.command(words.next().unwrap()).args(words).output().unwrap();
        all += &format!("{command}: {}\n", String::from_utf8_lossy(&output.stdout));
    }
    all
}

/// Everything below `folder`, with what files have in them.
fn files(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&path));
            found.push((path, String::new()));
        } else {
            // Those of a BPF file system can't be read.
            let text = fs::read_to_string(&path).unwrap_or_default();
            found.push((path, text));
        }
    }
    found.sort();
    found
}

/// Cgroups below `root`, without what they have in them.
fn cgroups(root: &Path) -> Vec<PathBuf> {
    let all = files(root).into_iter().map(|(path, _)| path);
    all.filter(|path| path.is_dir()).collect()
}

/// All that an agent, or a preflight, could leave on a node and its pod.
fn state(lab: &Lab, pod: &LabPod) -> String {
    let of_node = printed(
        lab.node.netns(),
        &[
            "ip rule",
            "ip -6 rule",
            "ip route show table all",
            "ip -details link",
            "ip -details addr",
            "tc qdisc",
            "tc filter show dev eth0 egress",
            "nft list ruleset",
            "ss -lntu",
        ],
    );
    let of_pod = printed(pod.netns(), &["ip rule", "ip route show table all", "ss -lntu"]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = |line: &&str| line.contains(&lab.node.folder().display().to_string());
    let mounts: Vec<&str> = mounts.lines().filter(ours).collect();
    let folders = [lab.node.bpffs(), lab.state()].map(|folder| files(&folder));
    format!("{of_node}{of_pod}{mounts:?}{folders:?}{:?}", cgroups(lab.node.root_cgroup()))
}

/// How many programs there are at the pods' cgroup, and above it.
fn programs(lab: &Lab) -> [u32; 2] {
    [lab.node.kubepods(), lab.node.root_cgroup()].map(|cgroup| programs_at(cgroup).unwrap())
}

#[test]
fn the_node_is_the_same_afterwards() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = pod(&lab);
    // Writes the kubeconfig, which is the lab's.
    drop(lab.preflight(&[], &[], &ALL).unwrap());
    let before = state(&lab, &pod);
    assert_eq!(programs(&lab), [0, 0]);
    let played = Setting::flags(&ALL).play(&lab);
    assert_eq!(played.status, Some(0), "{played:?}");
    assert_eq!(state(&lab, &pod), before);
    assert_eq!(programs(&lab), [0, 0], "no program is attached");
    // Nothing intercepts the pod.
    let attempt = pod.credentials().unwrap();
    assert_eq!(attempt.status, Some(200), "{attempt:?}");
    assert!(lab.role_of(&attempt).is_none(), "the pod has the node's credentials: {attempt:?}");
    // An agent leaves what the comparison finds.
    let mut agent = lab.agent(&[]);
    agent.kill().unwrap();
    assert_ne!(state(&lab, &pod), before);
    assert_ne!(programs(&lab), [0, 0]);
}

#[test]
fn a_node_that_lacks_nothing_has_nothing_but_good_lines() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = pod(&lab);
    lab.imds.require_tokens();
    lab.node.imds_netns().sysctl("ipv4/ip_default_ttl", "1").unwrap();
    lab.node.netns().ip("link add kube-ipvs0 type veth peer name other").unwrap();
    let played = Setting::flags(&ALL)
        .without(&["role-base-arn"])
        .and_flags(&[
            "--namespace-policy=required",
            "--role-base-arn-autodetect",
            "--startup-taint=a.example/b",
            &format!("--try-role={}", role_arn("reader")),
        ])
        .holding(pod)
        .play(&lab);
    let others: Vec<_> = played.checks.iter().filter(|check| check.verdict != "ok").collect();
    assert!(others.is_empty(), "{others:?}");
    assert_eq!((played.status, played.verdict.as_str()), (Some(0), "ok"));
    let names: Vec<_> = played.checks.iter().map(|check| check.name.as_str()).collect();
    let all: Vec<_> = Topic::ALL.iter().map(|topic| topic.name()).collect();
    // In the order of the report; the lab has no folder of units that outlives a boot.
    assert_eq!(names, all.into_iter().filter(|name| *name != "boot-guard").collect::<Vec<_>>());
}

/// As the init container of an agent that is to replace another one.
#[test]
fn beside_an_agent_it_finds_nothing_wrong_and_the_agent_notices_nothing() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = pod(&lab);
    let mut agent = lab.agent(&[]);
    lab.assert_served(&pod, "orders");
    let (before, log) = (state(&lab, &pod), agent.log());
    let played = init_container(&lab, &["--namespace-policy=optional"]);
    let failed: Vec<_> = played.checks.iter().filter(|check| check.verdict == "fail").collect();
    assert!(failed.is_empty() && played.status == Some(0), "{failed:?}");
    let finding = |name: &str| {
        let check = played.checks.iter().find(|check| check.name == name).unwrap();
        check.finding.clone()
    };
    assert!(finding("ports").contains("an agent serves here already"), "{played:?}");
    assert!(finding("bpffs").contains("an agent's programs"), "{played:?}");
    assert_eq!(state(&lab, &pod), before);
    // The agent tries the same from the same pod, and the node sends a destination few of the answers that this takes.
    lab::eventually("the route guard is seen to hold", || {
        let played = init_container(&lab, &["--namespace-policy=optional"]);
        let guard = played.checks.iter().find(|check| check.name == "route-guard").unwrap();
        guard.finding.contains("pass the node's routing")
    });
    let elsewhere = init_container(&lab, &["--host=10.99.0.1"]);
    let ports = elsewhere.checks.iter().find(|check| check.name == "ports").unwrap();
    assert_eq!(ports.verdict, "fail", "{ports:?}");
    let said: Vec<_> = agent.log().lines().skip(log.lines().count()).map(str::to_owned).collect();
    assert!(!said.iter().any(|line| line.contains("WARN") || line.contains("ERROR")), "{said:?}");
    lab.assert_served(&pod, "orders");
    // Its programs outlive the agent, and keep its ports for the next one.
    agent.kill().unwrap();
    let played = init_container(&lab, &["--namespace-policy=optional"]);
    let failed: Vec<_> = played.checks.iter().filter(|check| check.verdict == "fail").collect();
    assert!(failed.is_empty() && played.status == Some(0), "{failed:?}");
    let ports = played.checks.iter().find(|check| check.name == "ports").unwrap();
    assert!(ports.finding.contains("keep its ports for the next one"), "{ports:?}");
}

/// What hooks at connect would answer is no proof that packets bypass the node.
#[test]
fn in_an_agents_pod_what_its_guard_drops_is_unknown() {
    let Some(lab) = lab::node_test!() else { return };
    let _pod = pod(&lab);
    let _agent = lab.agent(&["--guard=skb"]);
    let played = init_container(&lab, &["--guard=route,skb"]);
    let check = played.checks.iter().find(|check| check.name == "route-guard").unwrap();
    assert_eq!(check.verdict, "unknown", "{check:?}");
    assert!(check.remedy.contains("kiam-agent status"), "{check:?}");
}

/// What comes of it in a pod on the node's network, which the agent's is.
fn init_container(lab: &Lab, flags: &[&str]) -> Played {
    let pod = lab.pod(PodSpec::new("kube-system", "kiam-agent").host_network()).unwrap();
    Setting::flags(flags).in_pod(pod).play(lab)
}

/// The agent would answer it in place of the metadata service, and as it answers other pods.
#[test]
fn a_preflight_that_an_agent_intercepts_does_not_take_it_for_the_metadata_service() {
    let Some(lab) = lab::node_test!() else { return };
    let flags = ["--host-network-pods=intercept"];
    let _agent = lab.agent(&flags);
    let played = init_container(&lab, &flags);
    assert_eq!(played.status, Some(0), "{played:?}");
    for name in ["imds", "imds-tokens", "hop-limit", "sts", "roles"] {
        let check = played.checks.iter().find(|check| check.name == name).unwrap();
        assert_eq!(check.verdict, "unknown", "{check:?}");
    }
    // One that no agent intercepts asks.
    let played = Setting::flags(&flags).play(&lab);
    let check = played.checks.iter().find(|check| check.name == "sts").unwrap();
    assert_eq!(check.verdict, "ok", "{check:?}");
}

#[test]
fn servers_that_hang_hold_it_up_for_their_deadlines_alone() {
    let Some(lab) = lab::node_test!() else { return };
    for faults in [lab.imds.faults(), lab.kubernetes.faults(), lab.sts.faults()] {
        faults.inject(Injected::hang());
    }
    let played = Setting::default().play(&lab);
    assert!(played.took < LIMIT, "{:?}", played.took);
    assert_eq!((played.status, played.verdict.as_str()), (Some(1), "fail"), "{played:?}");
    for (name, verdict) in [
        ("imds", "warn"),
        ("api", "fail"),
        ("pods", "unknown"),
        ("sts", "fail"),
        ("roles", "unknown"),
    ] {
        let check = played.checks.iter().find(|check| check.name == name).unwrap();
        assert_eq!(check.verdict, verdict, "{check:?}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = pod(&lab);
    let secrets = [
        "node-secret-key",
        "node-session-token",
        "hunter2",
        "secret-of-",
        "token-of-",
        "lab-imds-token",
    ];
    lab.imds.set_node_credentials(
        lab::fake::imds::NODE_ACCESS_KEY,
        "node-secret-key",
        "node-session-token",
    );
    for broken in [false, true] {
        if broken {
            lab.sts.faults().inject(Injected::refuse(403, "AccessDenied"));
        }
        let mut command = lab.preflight(&[], &[], &["--level=trace"]).unwrap();
        command.env("HTTP_PROXY", "http://user:hunter2@10.77.255.254:9");
        command.env("NO_PROXY", if broken { "" } else { "10.77.255.254" });
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(text[0].contains("sts"), "{text:?}");
        for secret in secrets {
            assert!(!text.concat().contains(secret), "{secret}: {text:?}");
        }
    }
    drop(pod);
}

/// A capability, as `setpriv` and reports name it, and what comes of an agent without it.
const CAPABILITIES: [(&str, &str, Without); 5] = [
    ("net_admin", "CAP_NET_ADMIN", Without::Ends),
    ("sys_admin", "CAP_SYS_ADMIN", Without::Says("The self-test fails")),
    ("net_raw", "CAP_NET_RAW", Without::Says("The self-test fails")),
    ("dac_read_search", "CAP_DAC_READ_SEARCH", Without::Rejects),
    ("sys_ptrace", "CAP_SYS_PTRACE", Without::Rejects),
];

#[derive(Clone, Copy)]
enum Without {
    Ends,
    Says(&'static str),
    Rejects,
}

/// Otherwise the check would ask for more than is needed, or for too little.
#[test]
fn without_a_capability_that_is_asked_for_the_agent_does_not_serve() {
    if lab::skip!() {
        return;
    }
    for (dropped, named, outcome) in CAPABILITIES {
        let lab = Lab::start().unwrap();
        let pod = pod(&lab);
        let bounding = format!("--bounding-set=-{dropped}");
        let played = Setting::by(&["setpriv", &bounding]).play(&lab);
        let check = played.checks.iter().find(|check| check.name == "capabilities").unwrap();
        assert!(check.verdict == "fail" && check.finding.contains(named), "{check:?}");
        let mut command: Command = lab.node.command("setpriv").unwrap();
        command.arg(&bounding).arg(agent_binary().unwrap());
        let mut agent = Agent::start_by(command, &lab, &[]).unwrap();
        match outcome {
            Without::Ends => assert!(!agent.wait_end(lab::READY_LIMIT).unwrap().success()),
            Without::Says(text) => drop(agent.wait_said(text, lab::READY_LIMIT).unwrap()),
            Without::Rejects => {
                agent.wait_ready(lab::READY_LIMIT).unwrap();
                let attempt = pod.credentials().unwrap();
                assert_ne!(attempt.status, Some(200), "{dropped}: {attempt:?}");
            }
        }
    }
}

/// `CAP_BPF` and `CAP_PERFMON` are parts of `CAP_SYS_ADMIN`: with that, an agent serves without them.
#[test]
fn without_other_capabilities_the_agent_serves() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = pod(&lab);
    let kept = "--bounding-set=-all,+net_admin,+sys_admin,+net_raw,+dac_read_search,+sys_ptrace";
    let played = Setting::by(&["setpriv", kept]).play(&lab);
    let check = played.checks.iter().find(|check| check.name == "capabilities").unwrap();
    assert_eq!(check.verdict, "ok", "{check:?}");
    let mut command = lab.node.command("setpriv").unwrap();
    command.arg(kept).arg(agent_binary().unwrap());
    let mut agent = Agent::start_by(command, &lab, &[]).unwrap();
    agent.wait_ready(lab::READY_LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
}
