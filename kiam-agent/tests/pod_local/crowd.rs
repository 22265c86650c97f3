//! Pods that come and go, and agents that follow one another, while others ask.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use lab::{
    Agent, Lab, PodSpec, eventually, eventually_is,
    pod_client::{Options, Tally},
    role_arn,
};
use tokio::time::Instant;

use super::{INSIDE, ON_THE_NODE, inside, many_pods, pod_inside, port_inside};

const ROLES: [&str; 3] = ["orders", "reports", "invoices"];
/// Logged by an agent when another serves.
const RELIEVED: &str = "A newer agent serves";
/// The verdict on a connect from a namespace that the agent does not know yet.
const TOO_EARLY: &str = "denied_namespace";
const LIMIT: Duration = Duration::from_secs(60);
/// Pods that come and go, twice, and how long that may take each time: then there are fewer.
const PODS: usize = 125;
const MAKING: Duration = Duration::from_secs(30);
const MAKERS: usize = 2;
/// What a runtime takes at least, once the sandbox is there, until the first process of a container runs.
const CONTAINER: Duration = Duration::from_millis(25);

/// Asserts that nothing failed and that every credential is of the role; how many there were.
fn assert_all(lab: &Lab, tally: &Tally, role: &str) -> u64 {
    assert!(tally.failures.is_empty(), "{role}: {:?}", tally.failures);
    for key in tally.keys.keys() {
        let owner = lab.sts.owner(key).map(|issued| issued.role);
        assert_eq!(owner, Some(role_arn(role)), "{role} got {key}");
    }
    tally.attempts()
}

/// Makes pods that ask, `gap` after the sandbox is there, and go; how many, and how many connects were too early.
fn come_and_go(lab: &Lab, name: &str, gap: Duration) -> (u64, u64) {
    let (begun, next) = (Instant::now(), AtomicUsize::new(0));
    let make = || {
        let (mut made, mut early) = (0, 0);
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= PODS || begun.elapsed() > MAKING {
                return (made, early);
            }
            let role = ROLES[number % ROLES.len()];
            let pod = lab.pod(PodSpec::new(name, &format!("pod-{number}")).role(role)).unwrap();
            thread::sleep(gap);
            early += lab.first_served(&pod, role);
            lab.delete(pod);
            made += 1;
        }
    };
    thread::scope(|scope| {
        let makers: Vec<_> = (0..MAKERS).map(|_| scope.spawn(make)).collect();
        let made = makers.into_iter().map(|maker| maker.join().unwrap());
        made.fold((0, 0), |(made, early), (more, too)| (made + more, early + too))
    })
}

#[test]
fn pods_come_and_go_under_load() {
    let Some(lab) = lab::pod_local_test!() else { return };
    // The self-test goes by the node too.
    let agent = lab.agent(&["--selftest-interval=1h"]);
    let stable = ROLES.map(|role| (role, pod_inside(&lab, role)));
    for (role, pod) in &stable {
        lab.assert_served(pod, role);
    }
    let held = agent.descriptors().unwrap();
    let asked = Options { pause_ms: 30, ..Options::default() };
    let asking: Vec<_> = stable.iter().map(|(_, pod)| pod.ask_from(2, &asked).unwrap()).collect();
    let begun = Instant::now();
    let mut shares = Vec::new();
    for (name, gap) in [("at-once", Duration::ZERO), ("as-a-runtime", CONTAINER)] {
        let counted = || agent.verdicts(ON_THE_NODE) + agent.verdicts(TOO_EARLY);
        let before = counted();
        let (count, early) = come_and_go(&lab, name, gap);
        println!("{early} connects of {count} pods were denied, {gap:?} after the sandbox");
        assert_eq!(counted() - before, early, "connects by the node, or denied for another reason");
        shares.push((early, count));
    }
    let took = begun.elapsed().as_secs_f64();
    let mut attempts = 0;
    for (asking, role) in asking.into_iter().zip(ROLES) {
        attempts += assert_all(&lab, &asking.finish().unwrap(), role);
    }
    let count: u64 = shares.iter().map(|(_, count)| count).sum();
    println!("{count} pods came and went in {took:.1} s while {attempts} others were answered");
    assert!(count >= 50 && attempts >= 100, "{count} pods and {attempts} attempts are no load");
    for (early, count) in shares {
        assert!(early * 20 <= count, "{early} connects of {count} pods were too early");
    }
    eventually("descriptors are closed", || agent.descriptors().unwrap() <= held + 4);
    let all = "kiam_sandboxes{state=\"ready\"}";
    eventually_is("the pods that are left", &3, || agent.metric(all));
    println!("{held} descriptors before, {} after", agent.descriptors().unwrap());
}

#[test]
fn what_pods_inside_cost_an_agent() {
    if lab::skip!() || lab::no_netns_cookies() {
        return;
    }
    // More by hand, for what 1,000 pods cost.
    let count = std::env::var("KIAM_TEST_PODS").map_or(50, |text| text.parse().unwrap());
    let lab = Lab::start().unwrap();
    let mut agent = lab.agent(&["--path=node"]);
    let pods = many_pods(&lab, count);
    lab.assert_role(&pods[0].credentials().unwrap(), "crowd");
    eventually_is("all pods are known", &count, || lab.shown_pods().len());
    let without = (agent.descriptors().unwrap(), agent.memory("VmRSS").unwrap() / 1024);
    agent.kill().unwrap();
    for before in ["by the node", "inside and killed"] {
        let begun = Instant::now();
        agent = lab.agent(&[]);
        let serves = begun.elapsed();
        while inside(&lab) < count {
            assert!(begun.elapsed() < LIMIT, "{} of {count}", inside(&lab));
        }
        let took = begun.elapsed();
        // The guard's first try has those of all pods open for a moment.
        let most = without.0 + 3 * count + 16;
        eventually("descriptors are closed", || agent.descriptors().unwrap() <= most);
        let (descriptors, memory) =
            (agent.descriptors().unwrap(), agent.memory("VmRSS").unwrap() / 1024);
        println!(
            "{count} pods, before {before}: the agent serves {serves:?} after its start, all are inside after \
             {took:?}; {descriptors} descriptors and {memory} KiB, and with --path=node {} and {} KiB",
            without.0, without.1
        );
        lab.assert_role(&pods[0].credentials().unwrap(), "crowd");
        agent.kill().unwrap();
    }
}

#[test]
fn takeovers_leave_the_listeners_where_they_are() {
    const TAKEOVERS: u32 = 5;
    // Connects of an agent's self-test, which go by the node.
    const PROOF: u64 = 3;
    let Some(lab) = lab::pod_local_test!() else { return };
    let mut agent = lab.agent(&["--selftest-interval=1h"]);
    let pods = ROLES.map(|role| pod_inside(&lab, role));
    for (pod, role) in pods.iter().zip(ROLES) {
        lab.assert_served(pod, role);
    }
    // One as it starts, and another where that failed on a busy machine.
    let made = |agent: &Agent| -> u64 {
        let made =
            |outcome| agent.metric(&format!("kiam_selftest_runs_total{{outcome=\"{outcome}\"}}"));
        eventually("the self-test passes", || made("Passed") > 0);
        made("Passed") + made("Failed")
    };
    let mut proofs = made(&agent);
    let ports = || pods.each_ref().map(|pod| port_inside(&lab, pod));
    let before = ports();
    let inside = agent.verdicts(INSIDE);
    let asked = Options { pause_ms: 30, ..Options::default() };
    let asking: Vec<_> = pods.iter().map(|pod| pod.ask_from(2, &asked).unwrap()).collect();
    for round in 0..TAKEOVERS {
        let next = lab.agent(&["--selftest-interval=1h"]);
        agent.wait_said(RELIEVED, LIMIT).unwrap();
        assert!(agent.terminate().unwrap().success(), "round {round}");
        agent = next;
        proofs += made(&agent);
        assert_eq!(ports(), before, "round {round}");
    }
    let tallies = asking.into_iter().map(|asking| asking.finish().unwrap());
    let attempts: u64 =
        tallies.zip(ROLES).map(|(tally, role)| assert_all(&lab, &tally, role)).sum();
    println!("{attempts} attempts across {TAKEOVERS} takeovers");
    assert!(attempts > 300, "{attempts} attempts are no load");
    let node = agent.verdicts(ON_THE_NODE);
    assert!(proofs > u64::from(TAKEOVERS), "{proofs} proofs");
    assert!(node <= PROOF * proofs, "{node} by the node, and {proofs} proofs");
    assert!(agent.verdicts(INSIDE) >= inside + attempts);
}
