//! Pods that ran before the kernel programs were attached, on a real kernel.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{fs, process::Child, thread, time::Duration};

use lab::{Agent, Lab, LabPod, PodSpec, eventually};
use serde_json::Value;

/// Start times are told in hundredths of a second.
const TICKS: Duration = Duration::from_millis(50);
const REASON: &str = "NodeCredentialsExposed";

fn pod(lab: &Lab, name: &str) -> LabPod {
    lab.pod(PodSpec::new("shop", name).role("orders")).unwrap()
}

/// The pods that have an Event.
fn told(lab: &Lab) -> Vec<String> {
    let events = lab.kubernetes.store().events();
    let events = events.iter().filter(|event| event["reason"] == REASON);
    let mut names: Vec<_> =
        events.map(|event| event["regarding"]["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// The pods of which `/pods` says it, with until when.
fn shown(lab: &Lab) -> Vec<(String, String)> {
    let of = |pod: &Value| {
        let until = pod["mayHoldNodeCredentialsUntil"].as_str()?.to_owned();
        Some((pod["name"].as_str()?.to_owned(), until))
    };
    lab.shown_pods().iter().filter_map(of).collect()
}

fn names(lab: &Lab) -> Vec<String> {
    shown(lab).into_iter().map(|(name, _)| name).collect()
}

fn counted(agent: &Agent) -> Option<u64> {
    let metrics = agent.admin("/metrics").ok()?.body;
    let line = metrics.lines().find_map(|it| it.strip_prefix("kiam_intercept_older_pods "))?;
    line.parse().ok()
}

fn explained(lab: &Lab, name: &str) -> String {
    lab.operator(&format!("/explain/shop/{name}")).unwrap().body
}

#[test]
fn a_pod_that_asked_before_the_agent_came_shows_and_a_later_one_does_not() {
    let Some(lab) = lab::node_test!() else { return };
    let early = pod(&lab, "early");
    // What the whole matter is about.
    let asked = early.credentials().unwrap();
    assert_eq!(lab.role_of(&asked), None, "{asked:?}");
    assert!(lab.imds.packets_from(early.v4().into()) > 0, "nothing came to the real service");
    let plain = lab.pod(PodSpec::new("shop", "plain")).unwrap();
    let _host = lab.pod(PodSpec::new("shop", "host").host_network()).unwrap();
    thread::sleep(TICKS);
    let agent = lab.agent(&[]);
    let late = pod(&lab, "late");
    late.credentials().unwrap();
    eventually("both shown", || names(&lab) == ["early", "plain"]);
    eventually("both counted", || counted(&agent) == Some(2));
    eventually("both told", || told(&lab) == ["early", "plain"]);
    let text = explained(&lab, "early");
    let until = &shown(&lab)[0].1;
    let says = format!("may hold the node's credentials until {until}");
    assert!(text.contains(&says), "{says}: {text}");
    assert!(!explained(&lab, "late").contains("node's credentials"));
    // The next looks find nothing else.
    thread::sleep(Duration::from_secs(6));
    assert_eq!((names(&lab).len(), told(&lab).len()), (2, 2));
    lab.delete(plain);
    eventually("one left", || counted(&agent) == Some(1));
}

#[test]
fn agents_that_come_later_know_it_as_long_as_nothing_was_detached() {
    let Some(lab) = lab::node_test!() else { return };
    let _early = pod(&lab, "early");
    thread::sleep(TICKS);
    let mut first = lab.agent(&[]);
    let _late = pod(&lab, "late");
    eventually("the first", || names(&lab) == ["early"]);
    let until = shown(&lab);
    // Takeover.
    let second = lab.agent(&[]);
    eventually("the second", || shown(&lab) == until);
    first.terminate().unwrap();
    // A gap without an agent is none of the programs.
    let mut second = second;
    second.kill().unwrap();
    let _denied = pod(&lab, "denied");
    thread::sleep(TICKS);
    let mut third = lab.agent(&[]);
    eventually("the third", || shown(&lab) == until);
    thread::sleep(Duration::from_secs(6));
    assert_eq!((shown(&lab), told(&lab)), (until.clone(), vec!["early".to_owned()]));
    // Without programs it is one.
    third.terminate().unwrap();
    lab.uninstall().unwrap();
    let _gap = pod(&lab, "gap");
    thread::sleep(TICKS);
    let _fourth = lab.agent(&[]);
    let _last = pod(&lab, "last");
    let all = ["denied", "early", "gap", "late"];
    eventually("all but the last", || names(&lab) == all);
    assert!(shown(&lab).iter().all(|(_, later)| *later >= until[0].1));
}

#[test]
fn programs_that_an_earlier_agent_had_not_make_no_pod_older() {
    let Some(lab) = lab::node_test!() else { return };
    let _early = pod(&lab, "early");
    thread::sleep(TICKS);
    let mut first = lab.agent(&[]);
    let _late = pod(&lab, "late");
    eventually("the first", || names(&lab) == ["early"]);
    let until = shown(&lab);
    first.kill().unwrap();
    // As an agent leaves it whose release has these two alone.
    let links = fs::read_dir(lab.pins().join("v2")).unwrap().flatten().map(|pin| pin.path());
    let mut removed = 0;
    for link in links.filter(|pin| pin.display().to_string().contains("/link_kiam_")) {
        if !link.ends_with("link_kiam_connect4") && !link.ends_with("link_kiam_connect6") {
            fs::remove_file(link).unwrap();
            removed += 1;
        }
    }
    assert!(removed >= 7, "{removed}");
    thread::sleep(TICKS);
    let second = lab.agent(&[]);
    eventually("the second", || shown(&lab) == until);
    eventually("one counted", || counted(&second) == Some(1));
    thread::sleep(Duration::from_secs(6));
    assert_eq!((shown(&lab), told(&lab)), (until, vec!["early".to_owned()]));
}

#[test]
fn an_agent_that_ended_before_it_recorded_the_links_makes_no_pod_older() {
    let Some(lab) = lab::node_test!() else { return };
    let _early = pod(&lab, "early");
    thread::sleep(TICKS);
    let mut first = lab.agent(&[]);
    let _late = pod(&lab, "late");
    eventually("the first", || names(&lab) == ["early"]);
    first.kill().unwrap();
    fs::remove_file(lab.pins().join("v2/ATTACHED")).unwrap();
    thread::sleep(TICKS);
    let second = lab.agent(&[]);
    eventually("one counted", || counted(&second) == Some(1));
    assert_eq!(names(&lab), ["early"]);
}

#[test]
fn a_release_with_another_layout_of_the_maps_makes_no_pod_older() {
    let Some(lab) = lab::node_test!() else { return };
    let _early = pod(&lab, "early");
    thread::sleep(TICKS);
    let mut first = lab.agent(&[]);
    let _late = pod(&lab, "late");
    eventually("the first", || names(&lab) == ["early"]);
    let until = shown(&lab);
    first.kill().unwrap();
    fs::rename(lab.pins().join("v2"), lab.pins().join("v1")).unwrap();
    thread::sleep(TICKS);
    let second = lab.agent(&[]);
    assert!(!lab.pins().join("v1").exists());
    eventually("the second", || shown(&lab) == until);
    eventually("one counted", || counted(&second) == Some(1));
}

#[test]
fn a_time_in_which_agents_only_observed_is_a_gap() {
    let Some(lab) = lab::node_test!() else { return };
    let mut first = lab.agent(&[]);
    let _before = pod(&lab, "before");
    thread::sleep(TICKS);
    eventually("a search", || counted(&first) == Some(0));
    first.kill().unwrap();
    let mut second = lab.agent(&["--mode=observe"]);
    let asked = pod(&lab, "meanwhile").credentials().unwrap();
    assert_eq!(lab.role_of(&asked), None, "{asked:?}");
    let _meanwhile = pod(&lab, "meanwhile-2");
    thread::sleep(TICKS);
    second.kill().unwrap();
    let _third = lab.agent(&[]);
    eventually("both", || names(&lab) == ["before", "meanwhile-2"]);
}

#[test]
fn programs_that_somebody_detached_make_all_pods_older() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let _pod = pod(&lab, "orders");
    thread::sleep(TICKS);
    eventually("a search", || counted(&agent) == Some(0));
    assert!(names(&lab).is_empty());
    lab.node.detach_link(&lab.pins().join("v2/link_kiam_connect4")).unwrap();
    eventually("the pod", || names(&lab) == ["orders"]);
}

fn idle(pod: &LabPod) -> Child {
    pod.command("sleep").unwrap().arg("infinity").spawn().unwrap()
}

#[test]
fn containers_that_start_again_hide_no_pod_that_has_a_process_of_its_sandbox() {
    let Some(lab) = lab::node_test!() else { return };
    let [held, bare] = ["held", "bare"].map(|name| pod(&lab, name));
    let mut processes = [idle(&held), idle(&bare)];
    thread::sleep(TICKS);
    let mut first = lab.agent(&[]);
    eventually("both", || names(&lab) == ["bare", "held"]);
    let until = shown(&lab);
    // A runtime that keeps no process for a sandbox, such as CRI-O by default, has only the container's.
    held.cgroup().kill().unwrap();
    bare.slice().kill().unwrap();
    for (process, pod) in processes.iter_mut().zip([&held, &bare]) {
        process.wait().unwrap();
        *process = idle(pod);
    }
    thread::sleep(TICKS);
    eventually("both as before", || shown(&lab) == until);
    // Only the processes tell an agent that comes later.
    let second = lab.agent(&[]);
    first.terminate().unwrap();
    eventually("the one with a process of its sandbox", || names(&lab) == ["held"]);
    eventually("one counted", || counted(&second) == Some(1));
    for process in &mut processes {
        process.kill().unwrap();
        process.wait().unwrap();
    }
}

#[test]
fn pods_that_may_come_back_are_evicted_where_that_is_asked_for() {
    let Some(lab) = lab::node_test!() else { return };
    let made_by = |name: &str, kind: &str| {
        lab.pod(PodSpec::new("shop", name).role("orders").controller(kind)).unwrap()
    };
    let _old = made_by("old", "ReplicaSet");
    let _daemon = made_by("daemon", "DaemonSet");
    let _bare = pod(&lab, "bare");
    thread::sleep(TICKS);
    let _agent = lab.agent(&["--evict-older-pods"]);
    let _young = made_by("young", "ReplicaSet");
    eventually("the eviction", || names(&lab) == ["bare", "daemon"]);
    thread::sleep(Duration::from_secs(15));
    let evictions: Vec<_> = lab
        .kubernetes
        .seen()
        .into_iter()
        .filter(|seen| seen.path.ends_with("/eviction"))
        .map(|seen| seen.path)
        .collect();
    assert_eq!(evictions, ["/api/v1/namespaces/shop/pods/old/eviction"]);
}
