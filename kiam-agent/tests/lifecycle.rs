//! What is left on the node by other agents, and what this one leaves: pins, cgroups, the end.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    fs::{self, File},
    os::unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use kiam_common::redirect::Target;
use kiam_core::blocking::Blocking;
use kiam_kernel::{
    intercept::{self, Error, Interception, InterceptionParts, RestoreOutcome, detach, uninstall},
    pins::AttachLock,
};
use lab::{
    Agent, Lab, LabPod, NODE_V4, Node, PodSpec, eventually,
    fake::imds::NODE_ACCESS_KEY,
    pod_client::{Attempt, Options},
    role_arn, tells_namespaces_apart,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use tokio::time::Instant;

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const LIMIT: Duration = Duration::from_secs(60);
const BACK: &str = "Restored detached kernel programs or removed pins";

/// Of the test's own thread.
fn blocking() -> Blocking {
    Blocking::here().expect("no runtime runs on it")
}

/// The same of a pod whose network namespace the agent may not know yet: until then it is denied, and nothing else.
fn assert_served_soon(lab: &Lab, pod: &LabPod, role: &str) {
    let denied = || pod.credentials().unwrap().error.as_deref() == Some("EPERM");
    eventually("still denied", || !denied());
    lab.assert_served(pod, role);
}

/// What is pinned in `folder`.
fn pins(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().map(Result::unwrap);
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Removes the pins' `folder`, which is gone at once for whoever looks.
fn take_away(folder: &Path) {
    let gone = folder.with_file_name("gone");
    fs::rename(folder, &gone).unwrap();
    fs::remove_dir_all(gone).unwrap();
}

/// Loads and attaches in the node's namespace, as the agent does.
fn attach(node: &Node) -> Result<InterceptionParts, Error> {
    let cgroup = Some(node.kubepods().to_owned());
    let config = intercept::Config::new(cgroup, node.bpffs().join("kiam"));
    let target = Target { v4: NODE_V4.octets(), v4_port: 3100, ..Target::default() };
    let load = || {
        Interception::load(&blocking(), &config, target)
            .and_then(|loaded| loaded.attach(&blocking(), &[]))
    };
    node.netns().enter(load).unwrap()
}

/// Asks while `work` is done; what came of it.
fn meanwhile(pod: &LabPod, work: impl FnOnce()) -> Vec<Attempt> {
    // Not more than its share, for as long as this goes on.
    let asking = Options { pause_ms: 20, ..Options::default() };
    let asked = pod.ask_meanwhile(&asking).unwrap();
    work();
    asked.finish().unwrap()
}

#[test]
fn older_layout_is_taken_over_with_no_instant_without_programs() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    let (current, older) = (lab.pins().join("v2"), lab.pins().join("v1"));
    let before = pins(&current);
    assert!(before.iter().any(|name| name == "link_kiam_sendmsg6"), "{before:?}");
    // First of an agent that died, then of one that runs.
    for dead in [true, false] {
        if dead {
            agent.kill().unwrap();
        }
        let mut next = None;
        let attempts = meanwhile(&pod, || {
            fs::rename(&current, &older).unwrap();
            // A program of the old release that the new one has no more.
            fs::rename(older.join("link_kiam_sendmsg6"), older.join("link_kiam_gone")).unwrap();
            next = Some(lab.agent(&[]));
        });
        let mut old = std::mem::replace(&mut agent, next.unwrap());
        let answered = attempts.iter().filter(|attempt| attempt.status == Some(200)).count();
        println!("dead: {dead}; {answered} of {} attempts were answered", attempts.len());
        assert!(answered > 0, "none was answered");
        for attempt in attempts.iter().filter(|attempt| attempt.status == Some(200)) {
            assert_eq!(lab.role_of(attempt), Some(role_arn("orders")), "{attempt:?}");
        }
        if !dead {
            old.wait_said("A newer agent serves", LIMIT).unwrap();
        }
        assert!(!older.exists(), "{:?}", pins(&older));
        assert_eq!(pins(&current), before);
        lab.assert_served(&pod, "orders");
    }
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn newer_layout_is_refused_with_a_sentence() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let folder = node.bpffs().join("kiam");
    attach(&node).unwrap();
    fs::rename(folder.join("v2"), folder.join("v3")).unwrap();
    let error = attach(&node).unwrap_err().to_string();
    for part in ["v3", "newer than this agent's v2", "uninstall"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(pins(&folder), ["v3"], "nothing is made beside it");
    // What is needed to go on, though it is of a layout that is not known.
    let removed = uninstall(&folder).unwrap();
    let folder = folder.join("v3").display().to_string();
    assert!(removed.contains(&folder), "{removed:?}");
    attach(&node).unwrap();
}

#[test]
fn half_finished_start_is_completed() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let folder = node.bpffs().join("kiam/v2");
    attach(&node).unwrap();
    let whole = pins(&folder);
    // Some links are missing, some maps too, one link waits to be renamed over another.
    for name in ["link_kiam_sock_ops", "link_kiam_connect4", "LEASE", "COUNTERS"] {
        fs::remove_file(folder.join(name)).unwrap();
    }
    let stray = folder.join("link_kiam_connect6_new");
    fs::rename(folder.join("link_kiam_connect6"), &stray).unwrap();
    let mut parts = attach(&node).unwrap();
    assert_eq!(pins(&folder), whole);
    parts.lease.renew().unwrap();
    let listener = node.netns().listen((NODE_V4, 3100).into()).unwrap();
    let attempt = thread::scope(|scope| {
        let options = Options { timeout_ms: 500, ..Options::get("/latest/") };
        let asking = scope.spawn(move || pod.ask_once(&options).unwrap());
        let (stream, peer) = listener.accept().unwrap();
        let local = stream.local_addr().unwrap();
        assert!(parts.flows.take_last(peer, local).unwrap().is_some(), "attested");
        drop(stream);
        asking.join().unwrap()
    });
    assert_ne!(attempt.error.as_deref(), Some("ETIMEDOUT"), "{attempt:?}");
}

/// Removes a cgroup in which nothing runs, with those below it.
fn remove(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            remove(&entry.path());
        }
    }
    fs::remove_dir(cgroup).unwrap();
}

/// Makes another cgroup in the place of the pods'.
fn recreate(root: &Path) {
    let held = File::open(root).unwrap();
    remove(root);
    fs::create_dir(root).unwrap();
    let ids = (held.metadata().unwrap().ino(), fs::metadata(root).unwrap().ino());
    assert_ne!(ids.0, ids.1, "another cgroup");
}

#[test]
fn recreated_pods_cgroup_is_followed() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let first = lab.served_pod("orders");
    lab.delete(first);
    let root = lab.node.kubepods().to_owned();
    for round in 0..2 {
        recreate(&root);
        let said = "The pods' cgroup was recreated; kernel programs attached to it";
        let count = |agent: &Agent| agent.log().matches(said).count();
        eventually("not noticed", || count(&agent) > round);
        agent.wait_ready(LIMIT).unwrap();
        let next = lab.pod_of("reports");
        assert_served_soon(&lab, &next, "reports");
        lab.assert_no_packets(&[&next]);
        lab.delete(next);
    }
    // While there is none, the agent is not ready and says why.
    remove(&root);
    eventually("still ready", || {
        let reply = agent.admin("/ready").unwrap();
        reply.status == 503 && reply.body.contains("pods' cgroup")
    });
    fs::create_dir(&root).unwrap();
    agent.wait_ready(LIMIT).unwrap();
    let last = lab.pod_of("invoices");
    assert_served_soon(&lab, &last, "invoices");
    lab.assert_no_packets(&[&last]);
}

#[test]
fn what_somebody_takes_from_a_running_agent_comes_back_and_lets_nothing_through() {
    let Some(lab) = lab::node_test!() else { return };
    // Nothing but the programs keeps pods from the IMDS.
    let mut agent = lab.agent(&["--guard=none"]);
    let pod = lab.served_pod("orders");
    let folder = lab.pins().join("v2");
    let before = pins(&folder);
    let attempts = meanwhile(&pod, || {
        for round in 1..3 {
            take_away(&lab.pins());
            eventually("the pins are not back", || {
                pins(&folder) == before && agent.log().matches(BACK).count() == round
            });
        }
    });
    for attempt in attempts {
        lab.assert_role(&attempt, "orders");
    }
    lab.assert_no_packets(&[&pod]);
    let refusal = format!("{:#}", lab.uninstall().unwrap_err());
    assert!(refusal.contains("an agent runs on this node"), "{refusal}");
    // They are the same that work, and outlive the agent.
    agent.kill().unwrap();
    // A connect to the node's listener is denied once the lease ends.
    let denied: &[&str] =
        if tells_namespaces_apart().unwrap() { &["EPERM"] } else { &["ECONNREFUSED", "EPERM"] };
    let attempt = pod.credentials().unwrap();
    assert!(attempt.error.as_deref().is_some_and(|error| denied.contains(&error)), "{attempt:?}");
    // What is detached works no longer, and until it is back the guard is all there is.
    let mut agent = lab.agent(&[]);
    let lock = AttachLock::take(&lab.pins()).unwrap().unwrap();
    let links = pins(&folder).iter().filter(|name| name.starts_with("link_kiam_")).count();
    detach(&lab.pins()).unwrap();
    eventually("still ready", || {
        let reply = agent.admin("/ready").unwrap();
        reply.status == 503 && reply.body.contains("restoring detached programs or pins")
    });
    let attempts = meanwhile(&pod, || {
        drop(lock);
        agent.wait_said(BACK, LIMIT).unwrap();
    });
    let last = attempts.last().unwrap();
    assert_eq!(lab.role_of(last), Some(role_arn("orders")), "{last:?}");
    agent.wait_ready(LIMIT).unwrap();
    let metrics = agent.metrics();
    let line = format!("kiam_intercept_restored_total{{what=\"Program\"}} {links}\n");
    assert!(metrics.contains(&line), "{line} is not in {metrics}");
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn an_agent_that_hangs_in_its_turn_keeps_nothing_detached() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&["--guard=none"]);
    let pod = lab.served_pod("orders");
    let _lock = AttachLock::take(&lab.pins()).unwrap().unwrap();
    let detached = Instant::now();
    detach(&lab.pins()).unwrap();
    agent.wait_said("while another agent attaches its own", LIMIT).unwrap();
    agent.wait_said(BACK, LIMIT).unwrap();
    let elapsed = detached.elapsed();
    assert!(elapsed > Duration::from_secs(2), "one that does not hang has its time: {elapsed:?}");
    lab.assert_served(&pod, "orders");
    agent.wait_ready(LIMIT).unwrap();
}

#[test]
fn pins_of_a_newer_release_that_died_are_left_alone_and_told_of_once() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pod = lab.pod_of("orders");
    let (ours, newer) = (lab.pins().join("v2"), lab.pins().join("v3"));
    fs::rename(&ours, &newer).unwrap();
    agent.wait_said("Kernel programs can't be attached again", LIMIT).unwrap();
    // It is tried again every second, and what is attached works.
    let asking = Options { for_ms: Some(2500), pause_ms: 20, ..Options::default() };
    for attempt in pod.ask(&asking).unwrap() {
        lab.assert_role(&attempt, "orders");
    }
    assert!(!ours.exists());
    assert_eq!(
        agent.log().matches("Kernel programs can't be attached again").count(),
        1,
        "{}",
        agent.log()
    );
    fs::rename(&newer, &ours).unwrap();
    agent.wait_ready(LIMIT).unwrap();
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn programs_of_another_agent_over_an_emptied_folder_are_told_from_ours() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let folder = node.bpffs().join("kiam");
    let mut first = attach(&node).unwrap().programs;
    assert!(first.drift().unwrap().is_empty());
    take_away(&folder);
    let mut other = attach(&node).unwrap().programs;
    let losses = first.drift().unwrap();
    assert!(losses.replaced.contains(&"kiam_connect4"), "{losses:?}");
    assert_eq!(first.restore().unwrap(), RestoreOutcome::Replaced);
    assert!(other.drift().unwrap().is_empty());
    drop(other);
    node.netns().enter(|| first.reassert(&blocking())).unwrap().unwrap();
    assert!(first.drift().unwrap().is_empty());
}

#[test]
fn detach_on_exit_takes_everything_away_unless_another_agent_serves() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&["--detach-on-exit"]);
    let pod = lab.served_pod("orders");
    let mut new = lab.agent(&["--detach-on-exit"]);
    old.wait_said("A newer agent serves", LIMIT).unwrap();
    assert!(old.terminate().unwrap().success());
    lab.assert_served(&pod, "orders");
    lab.assert_no_packets(&[&pod]);
    assert!(new.terminate().unwrap().success());
    assert!(pins(&lab.pins()).is_empty(), "{:?}", pins(&lab.pins()));
    // The kernel lets go of links a little after their last pin.
    eventually("still attached", || {
        pod.credentials().unwrap().field("AccessKeyId").as_deref() == Some(NODE_ACCESS_KEY)
    });
}

#[test]
fn agent_that_still_starts_ends_when_asked_though_it_is_process_1() {
    let Some(lab) = lab::node_test!() else { return };
    lab.kubernetes.stop();
    // Process 1 of a namespace is not ended by a signal that it does not handle.
    let mut command = lab.node.command("unshare").unwrap();
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", AGENT]);
    let mut agent = Agent::start_by(command, &lab, &[]).unwrap();
    agent.wait_said("Requests to the Kubernetes API fail", LIMIT).unwrap();
    let pid = agent.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let first = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    kill_process(first, Signal::TERM).unwrap();
    eventually("the agent goes on", || agent.said("Ending before it serves"));
    assert!(agent.terminate().unwrap().success(), "unshare ends as the agent does");
    assert!(!agent.said("Serving before pods and credentials are known"));
}

/// Has the shell go to `folder`, where a core would be, allow one, and do the rest.
fn with_cores(mut shell: Command, folder: &Path, rest: &str) -> Command {
    let script = format!("cd \"$0\" && {{ ulimit -c unlimited; {rest}; }}");
    shell.arg("-c").arg(script).arg(folder);
    shell
}

#[test]
fn agent_that_crashes_leaves_no_core_dump() {
    let Some(lab) = lab::node_test!() else { return };
    let folder = tempfile::tempdir().unwrap();
    let control = with_cores(Command::new("sh"), folder.path(), "kill -ABRT $$").status().unwrap();
    for entry in fs::read_dir(folder.path()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let shell = lab.node.command("sh").unwrap();
    let mut command = with_cores(shell, folder.path(), "exec \"$@\"");
    command.arg(AGENT);
    let mut agent = Agent::start_by(command, &lab, &[]).unwrap();
    agent.wait_ready(LIMIT).unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(cores.split_whitespace().nth(4), Some("0"), "{cores}");
    let pid = Pid::from_raw(agent.pid().cast_signed()).unwrap();
    if control.core_dumped() {
        // A collector that cores are piped to does not mind the limit: it is not all that keeps the memory in.
        prlimit(Some(pid), Resource::Core, Rlimit { current: None, maximum: None }).unwrap();
    } else {
        println!("agent_that_crashes_leaves_no_core_dump: no crash leaves a core here anyway");
    }
    kill_process(pid, Signal::ABORT).unwrap();
    let status = agent.terminate().unwrap();
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
    assert!(!status.core_dumped(), "{status}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(Result::unwrap).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn uninstall_says_what_it_removed_and_not_under_a_running_agent() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pod = lab.pod_of("orders");
    let refusal = format!("{:#}", lab.uninstall().unwrap_err());
    assert!(refusal.contains("an agent runs on this node"), "{refusal}");
    lab.assert_served(&pod, "orders");
    assert!(agent.terminate().unwrap().success());
    // Nor under one that only starts: it will attach what it finds, and renews no lease yet.
    lab.kubernetes.stop();
    let mut agent = lab.begin_agent(&[]);
    agent.wait_said("Short role names are completed", LIMIT).unwrap();
    let refusal = format!("{:#}", lab.uninstall().unwrap_err());
    assert!(refusal.contains("an agent runs on this node"), "{refusal}");
    agent.kill().unwrap();
    let folder = lab.pins().join("v2");
    let mut removed: Vec<PathBuf> = pins(&folder).iter().map(|name| folder.join(name)).collect();
    removed.push(folder);
    let said = lab.uninstall().unwrap();
    for path in removed {
        assert!(said.contains(&format!("removed {}", path.display())), "{path:?}: {said}");
    }
    assert!(pins(&lab.pins()).is_empty(), "{:?}", pins(&lab.pins()));
    // The kernel lets go of links a little after their last pin.
    eventually("still attached", || {
        pod.credentials().unwrap().field("AccessKeyId").as_deref() == Some(NODE_ACCESS_KEY)
    });
    let again = lab.uninstall().unwrap();
    assert!(again.contains("nothing is installed"), "{again}");
}

/// Whether it says that it did it, and what it says.
fn uninstall_by_force(lab: &Lab) -> (bool, String) {
    let mut command = lab.node.command(AGENT).unwrap();
    command.env_clear().args(["uninstall", "--force", "--bpffs"]).arg(lab.pins());
    command.arg("--state-dir").arg(lab.state());
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn uninstall_by_force_is_for_an_agent_that_hangs_and_takes_away_what_that_holds() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&["--guard=route,skb,uplink"]);
    let pod = lab.served_pod("orders");
    let before = pins(&lab.pins().join("v2"));
    let (done, said) = uninstall_by_force(&lab);
    assert!(!done && said.contains("was last heard from"), "{said}");
    lab.assert_served(&pod, "orders");
    assert!(!agent.said(BACK), "nothing was detached: {}", agent.log());
    agent.freeze().unwrap();
    eventually("an agent that hangs is taken for one that lives", || {
        let (done, said) = uninstall_by_force(&lab);
        assert!(
            !done || said.contains("pods reach the node's metadata service directly"),
            "{said}"
        );
        assert!(!done || said.contains("if it recovers, it reattaches everything"), "{said}");
        done
    });
    let node = || pod.credentials().unwrap().field("AccessKeyId");
    assert_eq!(node().as_deref(), Some(NODE_ACCESS_KEY));
    let (done, said) = uninstall_by_force(&lab);
    assert!(done && said.contains("nothing is installed"), "{said}");
    // As it said.
    agent.thaw().unwrap();
    agent.wait_said(BACK, LIMIT).unwrap();
    eventually("not everything is back", || pins(&lab.pins().join("v2")) == before);
    agent.wait_ready(LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
}
