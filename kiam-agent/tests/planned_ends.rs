//! An agent that is asked to end, while a pod asks every 50 ms: it serves until a successor does, or as long as it may.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{thread, time::Duration};

use lab::{
    Agent, Asking, IMDS_V4, Lab, LabPod, PodSpec, eventually,
    pod_client::{
        Options,
        attack::{Attack, stream::Way},
    },
    role_arn,
};
use rustix::process::Signal;
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_secs(60);
const SERVES: &str = "Listening";
const SERVES_ON: &str = "serving until another agent takes over";
const ENDS: &str = "Draining; the kernel programs stay and deny pods";
/// How long before the end of the grace period the service ends.
const MARGIN: Duration = Duration::from_secs(3);
struct Node {
    lab: Lab,
    agent: Agent,
    pod: LabPod,
    grace: Duration,
}

// === impl Node ===

impl Node {
    /// An agent that may take `grace` seconds to end, and a pod that it has served.
    fn start(grace: u32, further: &[&str]) -> Self {
        let lab = Lab::start().unwrap();
        let period = format!("--grace-period={grace}s");
        let flags: Vec<&str> = further.iter().copied().chain([&*period]).collect();
        let agent = lab.agent(&flags);
        let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
        let node = Self { lab, agent, pod, grace: Duration::from_secs(grace.into()) };
        node.assert_role();
        node
    }

    /// Asserts that the pod is given its own credentials.
    fn assert_role(&self) {
        self.lab.assert_role(&self.pod.credentials().unwrap(), "orders");
    }

    /// A client in the pod that asks every 50 ms, each time on a new connection.
    fn victim(&self) -> Asking {
        let options = Options { pause_ms: 50, ..Options::default() };
        self.pod.ask_from(1, &options).unwrap()
    }

    /// Asks the agent to end, and waits until it has heard that.
    fn ask_to_end(&mut self) -> Instant {
        let asked = Instant::now();
        self.agent.signal(Signal::TERM).unwrap();
        self.agent.wait_said(SERVES_ON, LIMIT).unwrap();
        asked
    }

    fn successor(&self) -> Agent {
        self.lab.begin_agent(&["--grace-period=30s"])
    }

    /// Asserts that the pod got its own credentials each time; how often it asked.
    fn assert_served(&self, victim: Asking) -> u64 {
        let tally = victim.finish().unwrap();
        assert!(tally.failures.is_empty(), "{tally:?}");
        for key in tally.keys.keys() {
            let owner = self.lab.sts.owner(key).map(|issued| issued.role);
            assert_eq!(owner, Some(role_arn("orders")), "{tally:?}");
        }
        tally.attempts()
    }

    /// Asserts that the agent has ended well, within its grace period.
    fn assert_ended(&mut self, asked: Instant) {
        let status = self.agent.wait_end(LIMIT).unwrap();
        assert!(status.success(), "{status}: {}", self.agent.log());
        let took = asked.elapsed();
        assert!(took < self.grace, "it would have been killed: {took:?}");
    }

    /// Asserts that the pod is denied, and by nobody else than the kernel.
    fn assert_denied(&self) {
        let attempt = self.pod.credentials().unwrap();
        assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{attempt:?}");
        assert!(Duration::from_micros(attempt.micros) < Duration::from_secs(1), "{attempt:?}");
        self.lab.assert_no_packets(&[&self.pod]);
    }
}

#[test]
fn successor_that_comes_after_sigterm_loses_no_request() {
    if lab::skip!() {
        return;
    }
    // Longer than the successor takes on any machine: how long the old agent waits is not what is tried here.
    let mut node = Node::start(120, &[]);
    let victim = node.victim();
    let asked = node.ask_to_end();
    let ready = node.agent.admin("/ready").unwrap();
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("pending: asked to end"), "{}", ready.body);
    // What the controller takes to notice that a pod is being deleted.
    thread::sleep(Duration::from_secs(1));
    let mut successor = node.successor();
    successor.wait_said(SERVES, LIMIT).unwrap();
    node.assert_ended(asked);
    successor.wait_ready(LIMIT).unwrap();
    assert!(node.agent.said("Ending; a newer agent serves"), "{}", node.agent.log());
    assert!(!node.agent.said("Draining"), "{}", node.agent.log());
    let asked = node.assert_served(victim);
    assert!(asked > 20, "{asked} attempts are no load");
    assert_eq!(node.lab.sts.requests(), 1, "the successor was given what the old agent held");
    node.lab.assert_no_packets(&[&node.pod]);
}

#[test]
fn agent_without_successor_serves_until_its_grace_period_is_nearly_over() {
    if lab::skip!() {
        return;
    }
    let mut node = Node::start(8, &[]);
    let victim = node.victim();
    let asked = node.ask_to_end();
    thread::sleep((node.grace - MARGIN).saturating_sub(asked.elapsed() + Duration::from_secs(1)));
    node.assert_served(victim);
    node.agent.wait_said(ENDS, LIMIT).unwrap();
    let served = asked.elapsed();
    assert!(served >= node.grace - MARGIN, "only for {served:?}");
    assert!(node.agent.said("No agent has taken over within the grace period"));
    eventually("the lease goes on", || {
        node.pod.credentials().is_ok_and(|attempt| attempt.error.as_deref() == Some("EPERM"))
    });
    node.assert_ended(asked);
    node.assert_denied();
}

#[test]
fn second_signal_ends_the_agent_at_once() {
    if lab::skip!() {
        return;
    }
    for second in [Signal::TERM, Signal::INT] {
        let mut node = Node::start(120, &[]);
        let asked = node.ask_to_end();
        // Who wants the programs away hears that the agent is about to end.
        let refusal = format!("{:#}", node.lab.uninstall().unwrap_err());
        assert!(refusal.contains("was asked to end and serves until"), "{refusal}");
        node.assert_role();
        node.agent.signal(second).unwrap();
        node.assert_ended(asked);
        assert!(node.agent.said(ENDS), "{}", node.agent.log());
        node.assert_denied();
    }
}

#[test]
fn interrupt_or_a_grace_period_of_nothing_ends_the_agent_at_once() {
    if lab::skip!() {
        return;
    }
    for (grace, signal) in [(120, Signal::INT), (0, Signal::TERM)] {
        let mut node = Node::start(grace, &[]);
        node.agent.signal(signal).unwrap();
        assert!(node.agent.wait_end(LIMIT).unwrap().success());
        assert!(!node.agent.said(SERVES_ON), "{}", node.agent.log());
        node.assert_denied();
    }
}

#[test]
fn successor_that_dies_half_way_leaves_the_ending_agent_serving() {
    if lab::skip!() {
        return;
    }
    let mut node = Node::start(20, &[]);
    let victim = node.victim();
    let asked = node.ask_to_end();
    // Once it has the sockets it may have replaced the programs too.
    for half_way in ["Short role names are completed", "Socket taken over"] {
        let mut successor = node.successor();
        successor.wait_said(half_way, LIMIT).unwrap();
        successor.kill().unwrap();
    }
    node.agent.wait_said("The successor ended before it took over", LIMIT).unwrap();
    node.assert_role();
    let left = (node.grace - MARGIN).saturating_sub(asked.elapsed() + Duration::from_secs(1));
    thread::sleep(left);
    node.assert_served(victim);
    node.agent.wait_said(ENDS, LIMIT).unwrap();
    assert!(asked.elapsed() >= node.grace - MARGIN);
    node.assert_ended(asked);
    node.assert_denied();
}

#[test]
fn programs_are_detached_within_the_grace_period_when_nobody_comes_and_not_before() {
    if lab::skip!() {
        return;
    }
    let mut node = Node::start(8, &["--detach-on-exit"]);
    let asked = node.ask_to_end();
    // A client that never finishes its request does not keep the programs attached.
    let mut client = node.pod.attacker().unwrap();
    client.must(Attack::Keep { way: Way::Connect, to: (IMDS_V4, 80).into() }).unwrap();
    let text = "GET /latest/meta-data/ HTTP/1.1\r\nHost: ".to_owned();
    client.must(Attack::Write { text }).unwrap();
    node.assert_role();
    node.lab.assert_no_packets(&[&node.pod]);
    node.assert_ended(asked);
    drop(client);
    assert!(asked.elapsed() >= node.grace - MARGIN);
    assert!(node.agent.said("Removed"), "{}", node.agent.log());
    assert!(!node.lab.pins().join("v2/link_kiam_connect4").exists());
}

#[test]
fn successor_that_still_lacks_a_role_takes_over_before_the_agent_ends() {
    if lab::skip!() {
        return;
    }
    let mut node = Node::start(30, &[]);
    let victim = node.victim();
    // STS gives this one to neither of them.
    node.lab.sts.stop();
    let _late = node.lab.pod(PodSpec::new("shop", "payroll").role("payroll")).unwrap();
    let mut successor = node.successor();
    successor.wait_said("Not taking over before pods and credentials are known", LIMIT).unwrap();
    let asked = node.ask_to_end();
    successor.wait_said(SERVES, LIMIT).unwrap();
    node.assert_ended(asked);
    assert!(node.agent.said("Ending; a newer agent serves"), "{}", node.agent.log());
    node.assert_served(victim);
    node.lab.assert_no_packets(&[&node.pod]);
}
