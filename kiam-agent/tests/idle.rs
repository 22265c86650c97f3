//! What a node pays for an agent that has nothing to do: the real binary on a lab node with a hundred quiet pods.
//!
//! Counts stand for time, as a busy machine does not change them: a processor is woken as often, and bpf(2) is called as
//! often, however long each takes.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use lab::{Agent, Lab, LabPod, PodSpec};
use tokio::time::Instant;

const PODS: u32 = 100;
/// After this nothing of the start goes on: 30 s until the kernel's table is known to be the agent's alone, and some.
const SETTLED: Duration = Duration::from_secs(45);
/// One self-test, whenever it comes.
const MINUTE: Duration = Duration::from_secs(60);
/// The most wake-ups of all threads a second, and calls of bpf(2): what was counted, and a fifth.
const WAKE_UPS: f64 = 6.5;
const BPF_CALLS: f64 = 15.0;

#[test]
fn an_idle_agent_is_hardly_woken_and_asks_the_kernel_little() {
    if lab::skip!() {
        return;
    }
    let lab = Lab::start().unwrap();
    // As API servers do. The lab's own pace is each second.
    lab.kubernetes.bookmark_every(Duration::from_secs(60));
    let pods: Vec<LabPod> = (0..PODS).map(|number| pod(&lab, number)).collect();
    let agent = lab.agent(&[]);
    thread::sleep(SETTLED);

    let (wake_ups, worked) = wake_ups(&agent);
    let rate = total(&wake_ups) as f64 / MINUTE.as_secs_f64();
    println!(
        "{PODS} quiet pods: {rate:.1} wake-ups a second, {} ms of a processor a minute",
        worked.as_millis()
    );
    for (thread, count) in &wake_ups {
        println!("  {thread}: {count} wake-ups a minute");
    }
    if let Some(calls) = bpf_calls(&agent) {
        let rate = calls as f64 / MINUTE.as_secs_f64();
        println!("{PODS} quiet pods: {rate:.1} calls of bpf(2) a second");
        assert!(rate <= BPF_CALLS, "{rate:.1} calls of bpf(2) a second");
    }
    assert!(rate <= WAKE_UPS, "{rate:.1} wake-ups a second: {wake_ups:?}");
    // It did what it is there for, and what it looks for it still finds.
    lab.assert_served(&pods[0], "role-0");
    drop(agent);
}

/// The hooks of cgroups at which agents attach programs, as `enum bpf_attach_type` numbers them.
const HOOKS: [(&str, u32); 10] = [
    ("egress", 1),
    ("sock_ops", 3),
    ("bind4", 8),
    ("bind6", 9),
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

#[test]
fn no_program_is_attached_that_the_flags_do_not_need() {
    if lab::skip!() {
        return;
    }
    let lab = Lab::start().unwrap();
    let enforcing: Vec<&str> = HOOKS[1..].iter().map(|(name, _)| *name).collect();
    let observing = ["sock_ops", "connect4", "connect6", "sendmsg4", "sendmsg6"];
    let with_packets: Vec<&str> = HOOKS.iter().map(|(name, _)| *name).collect();
    // Each takes over from the one before it, so that what that one had must go.
    let rows: [(&[&str], &[&str]); 8] = [
        (&["--guard=route,skb"], &with_packets),
        (&[], &enforcing),
        (&["--guard=none"], &enforcing),
        (&["--path=node"], &enforcing),
        (&["--path=pod-local"], &enforcing),
        (&["--host-network-pods=intercept"], &enforcing),
        (&["--identity=source-ip", "--path=node"], &enforcing),
        (&["--mode=observe"], &observing),
    ];
    let mut before = None;
    for (flags, programs) in rows {
        // The agent before it has the links of its programs open until it ends.
        drop(before.replace(lab.agent(flags)));
        let attached = HOOKS.into_iter().filter(|(name, hook)| {
            let count = lab::program_ids(lab.node.kubepods(), *hook).unwrap().len();
            assert!(count <= 1, "{flags:?}: {count} programs at {name}");
            count == 1
        });
        let attached: Vec<&str> = attached.map(|(name, _)| name).collect();
        assert_eq!(attached, programs, "{flags:?}");
    }
}

fn pod(lab: &Lab, number: u32) -> LabPod {
    let spec = PodSpec::new("shop", &format!("pod-{number}")).role(&format!("role-{number}"));
    lab.pod(spec).unwrap()
}

fn total(wake_ups: &BTreeMap<String, u64>) -> u64 {
    wake_ups.values().sum()
}

/// How often the agent's threads were woken in a minute, by their names, and how long processors worked for them.
fn wake_ups(agent: &Agent) -> (BTreeMap<String, u64>, Duration) {
    let before = threads(agent);
    // A thread that ends in between takes its counts along, so they are read again and again.
    let (mut last, began) = (before.clone(), Instant::now());
    while began.elapsed() < MINUTE {
        thread::sleep(Duration::from_secs(1));
        last.extend(threads(agent));
    }
    let (mut wake_ups, mut worked) = (BTreeMap::new(), 0);
    for (thread, (name, woken, nanos)) in last {
        let (woken_before, nanos_before) =
            before.get(&thread).map_or((0, 0), |(_, woken, nanos)| (*woken, *nanos));
        *wake_ups.entry(name).or_default() += woken - woken_before;
        worked += nanos - nanos_before;
    }
    (wake_ups, Duration::from_nanos(worked))
}

/// The agent's threads: name, voluntary switches, and nanoseconds on a processor.
fn threads(agent: &Agent) -> BTreeMap<String, (String, u64, u64)> {
    let mut threads = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().flatten() {
        let read = |file: &str| fs::read_to_string(thread.path().join(file));
        // It may end meanwhile.
        let (Ok(name), Ok(status), Ok(times)) = (read("comm"), read("status"), read("schedstat"))
        else {
            continue;
        };
        let woken = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let woken = woken.unwrap().trim().parse().unwrap();
        let nanos = times.split(' ').next().unwrap().parse().unwrap();
        let id = thread.file_name().into_string().unwrap();
        threads.insert(id, (name.trim().to_owned(), woken, nanos));
    }
    threads
}

/// How often the agent calls bpf(2) in a minute; `None` where strace is missing.
fn bpf_calls(agent: &Agent) -> Option<u64> {
    let summary = std::env::temp_dir().join(format!("kiam-idle-{}", agent.pid()));
    let mut strace = Command::new("timeout");
    strace.args(["--signal=INT", &MINUTE.as_secs().to_string()]);
    strace.args(["strace", "-qq", "-c", "-f", "-p", &agent.pid().to_string(), "-o"]).arg(&summary);
    let ended = strace.stdin(Stdio::null()).output().unwrap();
    let Ok(text) = fs::read_to_string(&summary) else {
        eprintln!("calls of bpf(2) were not counted: strace is missing or failed: {ended:?}");
        return None;
    };
    fs::remove_file(&summary).unwrap();
    println!("{text}");
    let row = text.lines().find(|line| line.split_whitespace().last() == Some("bpf"));
    let calls = row.map_or(Some("0"), |row| row.split_whitespace().nth(3));
    Some(calls.unwrap().parse().unwrap())
}
