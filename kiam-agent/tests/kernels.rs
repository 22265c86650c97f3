//! The whole agent on this kernel: its self-test, its pods' roles, its death and its return, with flags that kernels differ in.
//!
//! `cargo xtask test kernels` runs this on other kernels, and reads a line for each row.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use lab::{
    Agent, IMDS_V4, Lab, LabPod, PodSpec, agent_binary,
    fake::imds::NODE_ACCESS_KEY,
    has_ipv6,
    pod_client::{
        Options, Via,
        attack::{Attack, raw},
    },
    tells_namespaces_apart,
};

/// On an emulated processor the verifier alone takes a while.
const LIMIT: Duration = Duration::from_secs(300);
/// Before each row's result: what the run on other kernels looks for.
const MARK: &str = "kiam-kernels:";
/// What the agent says then.
const REFUSED: &str = "--path=pod-local needs kernel 5.14";
/// Rows to play, by parts of their names with commas between; else all.
const ONLY: &str = "KIAM_KERNEL_ROWS";
/// Too little for the agent's maps, where they count against it; for getting and raising it, as `prlimit` takes it.
const MEMLOCK: &str = "--memlock=65536:65536";
/// What takes away the right to raise it, as `setpriv` takes it.
const NO_RAISE: &str = "--bounding-set=-sys_resource";
/// What the agent says where maps count against the limit, and it may not raise that.
const NO_MEMLOCK: &str = "before kernel 5.11, an unlimited RLIMIT_MEMLOCK";

/// What a row does, and what it says when that went well.
type Row = (&'static str, fn() -> &'static str);

const ROWS: [Row; 7] = [
    ("defaults", || serves(&[])),
    ("--guard=route,skb,uplink", || serves(&["--guard=route,skb,uplink"])),
    ("--path=node", || serves(&["--path=node"])),
    ("--path=pod-local", pod_local),
    ("hostNetwork pods", host_network),
    ("memlock 64 KiB", || memlock(&["prlimit", MEMLOCK])),
    ("memlock 64 KiB, no CAP_SYS_RESOURCE", || memlock(&["prlimit", MEMLOCK, "setpriv", NO_RAISE])),
];

#[test]
fn the_agent_serves_with_each_flag_that_kernels_differ_in() {
    if lab::skip!() {
        return;
    }
    let only = env::var(ONLY).unwrap_or_default();
    let chosen = |name: &str| only.split(',').any(|part| name.contains(part));
    let mut failures = Vec::new();
    for (name, row) in ROWS.into_iter().filter(|(name, _)| chosen(name)) {
        // A panic's message is on the console, with the agent's output.
        match catch_unwind(AssertUnwindSafe(row)) {
            Ok(result) => println!("{MARK} {name}: {result}"),
            Err(_) => {
                println!("{MARK} {name}: FAILED: see above");
                failures.push(name);
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// The agent comes to a green self-test, serves by each address, and is killed and started again, with nothing at the real service.
fn serves(flags: &[&str]) -> &'static str {
    let lab = Lab::start().unwrap();
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let mut agent = proven(&lab, flags);
    ask_every_way(&lab, &pod);
    let mut attacker = pod.attacker().unwrap();
    let (from, to) = (pod.v4().into(), IMDS_V4.into());
    for way in [raw::Way::Echo, raw::Way::SynHeader] {
        attacker.attempt(Attack::Raw { way, from, to }, 1000).unwrap();
    }
    agent.kill().unwrap();
    let refused = pod.credentials().unwrap();
    assert!(refused.status.is_none() && refused.error.is_some(), "{refused:?}");
    let _agent = proven(&lab, flags);
    ask_every_way(&lab, &pod);
    lab.assert_no_packets(&[&pod]);
    "passed"
}

/// Starts the agent; its self-test is green.
fn proven(lab: &Lab, flags: &[&str]) -> Agent {
    let agent = lab.agent(flags);
    let ready = agent.admin("/ready").unwrap();
    assert!(ready.body.contains("self-test: passed"), "{}", ready.body);
    agent
}

fn ask_every_way(lab: &Lab, pod: &LabPod) {
    let further: &[Via] = if has_ipv6() { &[Via::V4Mapped, Via::V6] } else { &[] };
    for via in [Via::V4].iter().chain(further) {
        let attempt = pod.ask_once(&Options { via: *via, ..Options::default() }).unwrap();
        lab.assert_role(&attempt, "orders");
    }
}

/// A pod on the node's network is the node. The lab's node is no machine but a namespace, as a kind node is.
fn host_network() -> &'static str {
    let lab = Lab::start().unwrap();
    let pod = lab.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
    let _agent = proven(&lab, &[]);
    let attempt = pod.credentials().unwrap();
    let key = attempt.field("AccessKeyId");
    assert_eq!(key.as_deref(), Some(NODE_ACCESS_KEY), "{attempt:?}");
    "pass"
}

/// The agent by `prefix`, which limits what it may lock: it serves, or its first error says what to do.
fn memlock(prefix: &[&str]) -> &'static str {
    let may_raise = !prefix.contains(&NO_RAISE);
    let lab = Lab::start().unwrap();
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let mut command = lab.node.command(prefix[0]).unwrap();
    command.args(&prefix[1..]).arg(agent_binary().unwrap());
    let mut agent = Agent::start_by(command, &lab, &[]).unwrap();
    // Below 5.14 and not 5.11, as far as this can tell: nothing between is tried.
    let counts = !tells_namespaces_apart().unwrap() && !may_raise;
    if agent.wait_ready(LIMIT).is_ok() {
        assert!(!counts, "the agent can't have this memory");
        lab.assert_role(&pod.credentials().unwrap(), "orders");
        return "passed";
    }
    assert!(counts && agent.said(NO_MEMLOCK), "{}", agent.log());
    assert_eq!(agent.wait_end(LIMIT).unwrap().code(), Some(1), "{}", agent.log());
    "refused at the start, with the remedy"
}

/// Where the kernel can't have it, the start ends before anything is attached.
fn pod_local() -> &'static str {
    let flags = ["--path=pod-local"];
    if tells_namespaces_apart().unwrap() {
        return serves(&flags);
    }
    let lab = Lab::start().unwrap();
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let mut agent = lab.begin_agent(&flags);
    let status = agent.wait_end(LIMIT).unwrap();
    assert_eq!(status.code(), Some(1), "{}", agent.log());
    assert!(agent.said(REFUSED), "{}", agent.log());
    let pinned = fs::read_dir(lab.pins()).map_or(0, Iterator::count);
    assert_eq!(pinned, 0, "nothing is pinned");
    let attempt = pod.credentials().unwrap();
    let key = attempt.field("AccessKeyId");
    assert_eq!(key.as_deref(), Some(NODE_ACCESS_KEY), "nothing is attached: {attempt:?}");
    "refused at the start, nothing attached"
}
