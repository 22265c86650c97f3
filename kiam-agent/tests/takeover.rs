//! One agent after another on a lab node: no request fails between them, whatever becomes of either.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use kiam_common::redirect::Target;
use kiam_core::blocking::Blocking;
use kiam_kernel::{
    intercept::{self, Interception},
    pins::AttachLock,
};
use lab::{
    Agent, Attacker, Cgroup, IMDS_V4, Lab, LabPod, Meanwhile, NODE_V4, PodSpec, eventually,
    fake::imds::NODE_ACCESS_KEY,
    pod_client::{
        Attempt, Options, Via,
        attack::{Attack, stream::Way},
    },
    role_arn, tells_namespaces_apart,
};
use tokio::time::Instant;

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const LIMIT: Duration = Duration::from_secs(60);
const SERVES: &str = "Listening";
const RELIEVED: &str = "A newer agent serves";
const THREADS: usize = 4;
/// Between two attempts of a client: all of a pod's together stay below its share, at three requests each.
const PAUSE_MS: u64 = 60;

const IMDS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);
/// The takeovers that pods come in the middle of. Such a pod pauses between two attempts, and once connected.
const BETWEEN: usize = 8;
const OFTEN_MS: u64 = 15;
const LATE_MS: u64 = 30;
/// For each step of an attempt.
const PATIENCE_MS: u64 = 5000;
/// Logged by an agent that has another one's sockets, before that one is superseded.
const TAKES: &str = "Socket taken over from the agent that runs";

/// Of the test's own thread.
fn blocking() -> Blocking {
    Blocking::here().expect("no runtime runs on it")
}

/// What `status` says of the agent that it finds, run with `prefix` before it.
fn status(lab: &Lab, prefix: &[&str]) -> (bool, String) {
    let words: Vec<&str> = prefix.iter().copied().chain([AGENT, "status", "--state-dir"]).collect();
    let mut command: Command = lab.node.command(words[0]).unwrap();
    let output = command.args(&words[1..]).arg(lab.state()).stdin(Stdio::null()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Several clients in each of the pods, asking all the while.
struct Load<'a> {
    lab: &'a Lab,
    clients: Vec<(&'static str, Meanwhile)>,
}

impl<'a> Load<'a> {
    fn start(lab: &'a Lab, pods: &[(&'static str, LabPod)]) -> Self {
        let asking = Options { pause_ms: PAUSE_MS, ..Options::default() };
        let clients = pods.iter().flat_map(|(role, pod)| {
            let asking = &asking;
            (0..THREADS).map(move |_| (*role, pod.ask_meanwhile(asking).unwrap()))
        });
        Self { lab, clients: clients.collect() }
    }

    /// Asserts that every attempt got its own role's credentials; how many there were.
    fn finish(self) -> usize {
        let mut count = 0;
        let mut failed = Vec::new();
        for (role, client) in self.clients {
            for attempt in client.finish().unwrap() {
                count += 1;
                let good = attempt.status == Some(200)
                    && attempt.error.is_none()
                    && self.lab.role_of(&attempt) == Some(role_arn(role));
                if !good {
                    failed.push((role, attempt));
                }
            }
        }
        assert!(failed.is_empty(), "{} of {count} failed: {:?}", failed.len(), &failed[..1]);
        count
    }
}

fn three_pods(lab: &Lab) -> [(&'static str, LabPod); 3] {
    let pods = ["orders", "reports", "invoices"].map(|role| (role, lab.pod_of(role)));
    for (role, pod) in &pods {
        lab.assert_served(pod, role);
    }
    pods
}

/// Connects, and asks a moment later: until then the connection waits in the queue of the listener.
fn ask_late(pod: &LabPod) -> Attempt {
    let mut attacker = pod.attacker().unwrap();
    // The agent may close one with its answer.
    for _ in 0..3 {
        let kept = attacker.attempt(Attack::Keep { way: Way::Connect, to: IMDS }, PATIENCE_MS);
        let kept = kept.unwrap();
        if kept.error.is_some() {
            return kept;
        }
    }
    thread::sleep(Duration::from_millis(LATE_MS));
    attacker.attempt(Attack::AskKept, PATIENCE_MS).unwrap()
}

/// Those of a pod's attempts that failed after the first that did not.
fn failed_later(attempts: Vec<Attempt>) -> impl Iterator<Item = Attempt> {
    let good = |attempt: &Attempt| attempt.status == Some(200) && attempt.error.is_none();
    let later = attempts.into_iter().skip_while(move |attempt| !good(attempt));
    later.filter(move |attempt| !good(attempt))
}

/// Makes one pod after the other until `agent` serves, of which each asks until it is ready. How many pods came, and what
/// failed after a pod was served once.
fn pods_come_until_it_serves(lab: &Lab, agent: &mut Agent, name: &str) -> (usize, Vec<Attempt>) {
    let asking = Options { pause_ms: OFTEN_MS, ..Options::default() };
    let ready = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut asked = Vec::new();
        while !agent.said(SERVES) {
            let spec = PodSpec::new("shop", &format!("{name}-{}", asked.len())).role("orders");
            let pod = lab.pod(spec).unwrap();
            let often = pod.ask_meanwhile(&asking).unwrap();
            let ready = &ready;
            asked.push(scope.spawn(move || {
                let mut late = Vec::new();
                while !ready.load(Ordering::Relaxed) {
                    late.push(ask_late(&pod));
                }
                let often = often.finish().unwrap();
                lab.delete(pod);
                failed_later(often).chain(failed_later(late)).collect::<Vec<_>>()
            }));
        }
        agent.wait_ready(LIMIT).unwrap();
        ready.store(true, Ordering::Relaxed);
        let count = asked.len();
        (count, asked.into_iter().flat_map(|pod| pod.join().unwrap()).collect())
    })
}

/// A pod that comes once the sockets were passed has a listener of both agents.
#[test]
fn a_pod_that_comes_between_two_agents_is_not_denied_once_it_is_served() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let (mut pods, mut failed) = (0, Vec::new());
    for takeover in 0..BETWEEN {
        let mut next = lab.begin_agent(&[]);
        next.wait_said(TAKES, LIMIT).unwrap();
        let (came, of_these) = pods_come_until_it_serves(&lab, &mut next, &takeover.to_string());
        pods += came;
        failed.extend(of_these);
        agent.terminate().unwrap();
        agent = next;
    }
    println!("{pods} pods came between two agents, and {} attempts failed", failed.len());
    assert!(pods > BETWEEN, "no pod came in time");
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn pods_that_come_between_two_agents_are_served_by_the_one_that_is_left() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let mut abandoned = 0;
    // Four, and on a busy machine more, with one pod that comes sooner.
    for takeover in 0..24 {
        if takeover >= 4 && abandoned > 0 {
            break;
        }
        let mut next = lab.begin_agent(&[]);
        next.wait_said(TAKES, LIMIT).unwrap();
        let count = if takeover < 4 { 3 } else { 1 };
        let pods: Vec<_> = (0..count)
            .map(|n| {
                let name = format!("between-{takeover}-{n}");
                lab.pod(PodSpec::new("shop", &name).role("orders")).unwrap()
            })
            .collect();
        let killed_later = takeover < 4 && takeover % 2 == 1;
        if !killed_later {
            next.freeze().unwrap();
        }
        if next.said(SERVES) || agent.said(RELIEVED) || killed_later {
            next.thaw().unwrap();
            agent.kill().unwrap();
            next.wait_said(SERVES, LIMIT).unwrap();
            agent = next;
        } else {
            next.kill().unwrap();
            abandoned += 1;
        }
        for pod in &pods {
            eventually("the pod is not served", || {
                pod.credentials().is_ok_and(|attempt| attempt.status == Some(200))
            });
        }
        for pod in pods.iter().cycle().take(30) {
            lab.assert_served(pod, "orders");
        }
        lab.assert_no_packets(&pods.iter().collect::<Vec<_>>());
        pods.into_iter().for_each(|pod| lab.delete(pod));
    }
    assert!(abandoned > 0, "no successor was killed in time");
}

#[test]
fn twenty_takeovers_under_load_fail_no_request() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pods = three_pods(&lab);
    let started = Instant::now();
    let mut asked = 0;
    for round in 0..20 {
        let load = Load::start(&lab, &pods);
        let next = lab.agent(&[]);
        agent.wait_said(RELIEVED, LIMIT).unwrap();
        assert!(agent.terminate().unwrap().success(), "round {round}");
        // It would wait for seconds, if the agent before it accepted the self-test's connections.
        assert!(!next.said("The self-test failed"), "round {round}: {}", next.log());
        for agent in [&agent, &next] {
            assert!(!agent.said("Restored detached"), "nothing was detached: {}", agent.log());
            assert!(!agent.said("Pods don't come to this agent"), "{}", agent.log());
        }
        agent = next;
        asked += load.finish();
    }
    println!("{asked} attempts in {:?} across 20 takeovers", started.elapsed());
    assert!(asked > 500, "{asked} attempts are no load");
    assert_eq!(lab.sts.requests(), 3, "each agent was given what the one before it held");
    lab.assert_no_packets(&pods.each_ref().map(|(_, pod)| pod));
}

/// The listeners at all ports of loopback that an agent would choose in this network namespace.
fn every_port() -> Vec<TcpListener> {
    let ports = (61_000..=65_535).chain(32_700..32_768).chain(914..=952);
    ports.filter_map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()).collect()
}

#[test]
fn pods_that_come_and_go_hold_connections_or_take_all_ports_gain_nothing_by_takeovers() {
    const ROUNDS: usize = 6;
    let Some(lab) = lab::node_test!() else { return };
    let pod = |name: &str, role| lab.pod(PodSpec::new("mob", name).role(role)).unwrap();
    let squatter = pod("squatter", "reports");
    let ports = squatter.netns().enter(every_port).unwrap();
    assert!(ports.len() > 4000, "{}", ports.len());
    let mut agent = lab.agent(&[]);
    let pods = three_pods(&lab);
    let holder = pod("holder", "orders");
    let imds = (IMDS_V4, 80).into();
    let mut held = holder.attacker().unwrap();
    held.must(Attack::Hold { to: imds, count: 150 }).unwrap();
    held.must(Attack::Keep { way: Way::Connect, to: imds }).unwrap();
    held.must(Attack::Write { text: "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-".to_owned() })
        .unwrap();
    let over = AtomicBool::new(false);
    let made = thread::scope(|scope| {
        let making = scope.spawn(|| {
            let (mut made, mut early) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                let asks = pod(&format!("asks-{made}"), "invoices");
                early += lab.first_served(&asks, "invoices");
                lab.delete(asks);
                // One that goes at once, with whatever is being opened in it.
                lab.delete(pod(&format!("goes-{made}"), "orders"));
                made += 2;
            }
            assert!(early <= 1 + made / 20, "{early} connects of {made} pods were too early");
            made
        });
        let mut ports = Some(ports);
        for round in 0..ROUNDS {
            let load = Load::start(&lab, &pods);
            let next = lab.agent(&[]);
            ports = match ports.take() {
                Some(_) => None,
                None => Some(squatter.netns().enter(every_port).unwrap()),
            };
            agent.wait_said(RELIEVED, LIMIT).unwrap();
            assert!(agent.terminate().unwrap().success(), "round {round}");
            agent = next;
            let asked = load.finish();
            lab.assert_served(&squatter, "reports");
            println!(
                "{round}: {asked} attempts, {} ports taken",
                ports.as_ref().map_or(0, Vec::len)
            );
        }
        over.store(true, Ordering::Relaxed);
        making.join().unwrap()
    });
    println!("{made} pods came and went in {ROUNDS} takeovers");
    lab.assert_served(&holder, "orders");
    lab.assert_no_packets(&pods.each_ref().map(|(_, pod)| pod));
}

/// Makes `count` empty cgroups below the container's own, as a process in it can that has mounted cgroup2 in a user
/// namespace of its own.
fn storm(pod: &LabPod, count: usize) {
    const MAKERS: usize = 4;
    const FOLDER: usize = 200;
    let make = |maker| {
        for number in (maker..count).step_by(MAKERS) {
            let folder = pod.cgroup().path().join(format!("{maker}-{}", number / FOLDER));
            fs::create_dir_all(folder.join(number.to_string())).unwrap();
        }
    };
    thread::scope(|scope| (0..MAKERS).for_each(|maker| drop(scope.spawn(move || make(maker)))));
}

/// What the cheapest of three take-overs under load, which lose nothing, and of three restarts uses of processors.
fn takeover_and_restart(
    lab: &Lab,
    pods: &[(&'static str, LabPod)],
    agent: &mut Agent,
) -> [Duration; 2] {
    let mut best = [LIMIT; 2];
    for _ in 0..3 {
        let load = Load::start(lab, pods);
        let next = lab.agent(&[]);
        best[0] = best[0].min(next.cpu_time().unwrap());
        agent.wait_said(RELIEVED, LIMIT).unwrap();
        assert!(agent.terminate().unwrap().success());
        *agent = next;
        load.finish();
        agent.kill().unwrap();
        *agent = lab.agent(&[]);
        best[1] = best[1].min(agent.cpu_time().unwrap());
        pods.iter().for_each(|(role, pod)| lab.assert_served(pod, role));
    }
    best
}

#[test]
fn cgroups_that_one_pod_makes_keep_no_agent_from_the_others() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pods = three_pods(&lab);
    let hostile = lab.pod(PodSpec::new("other", "hostile").role("orders")).unwrap();
    let control = takeover_and_restart(&lab, &pods, &mut agent);
    storm(&hostile, 20_000);
    let stormed = takeover_and_restart(&lab, &pods, &mut agent);
    println!("take-over, restart: {control:?} without the cgroups, {stormed:?} with them");
    // What else the machine does may double it; a walk of all of them takes several seconds.
    for (control, stormed) in control.into_iter().zip(stormed) {
        assert!(stormed < 2 * control + Duration::from_secs(1), "{stormed:?}, not {control:?}");
    }
    lab.assert_no_packets(&pods.each_ref().map(|(_, pod)| pod));
}

#[test]
fn successor_with_another_port_takes_over_without_a_gap() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pods = three_pods(&lab);
    for port in ["--port=3200", "--port=0", "--port=3100"] {
        let load = Load::start(&lab, &pods);
        let next = lab.agent(&[port]);
        agent.wait_said(RELIEVED, LIMIT).unwrap();
        assert!(agent.terminate().unwrap().success(), "{port}");
        agent = next;
        load.finish();
    }
    lab.assert_no_packets(&pods.each_ref().map(|(_, pod)| pod));
}

#[test]
fn successor_that_goes_by_addresses_takes_the_filter_of_syns_away() {
    let Some(lab) = lab::node_test!() else { return };
    // Of a host's process, as it comes of a guest that the hooks don't see: there is no record of it.
    let connect = || {
        let to = (NODE_V4, 3100).into();
        let limit = Duration::from_millis(500);
        lab.node.netns().enter(|| TcpStream::connect_timeout(&to, limit)).unwrap().is_ok()
    };
    let mut old = lab.agent(&[]);
    assert!(!connect(), "filtered");
    for flag in ["--identity=source-ip", "--interceptor=off"] {
        let next = lab.agent(&[flag]);
        assert!(next.said("Socket taken over"), "{}", next.log());
        old.wait_said(RELIEVED, LIMIT).unwrap();
        assert!(connect(), "{flag}");
        // Where there are to be no programs, those of before are still there, and refuse pods.
        let told = next.said("kernel programs are still attached");
        assert_eq!(told, flag == "--interceptor=off", "{}", next.log());
        let filters = lab.agent(&[]);
        assert!(!connect(), "filtered again");
        drop(next);
        old = filters;
    }
}

#[test]
fn relieved_agent_stays_alive_and_unready_and_leaves_the_lease() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    let mut new = lab.agent(&[]);
    old.wait_said(RELIEVED, LIMIT).unwrap();
    // On the host every agent can be seen, and the newest is asked.
    eventually("the new agent is not ready", || is_ready(&status(&lab, &[])));
    let (ready, text) = status(&lab, &["unshare", "--pid", "--fork", "--mount-proc"]);
    assert!(!ready && text.contains("run in other containers"), "{text}");
    // Of an operator who is in another cgroup, and may not look at the node's first process.
    let mount = lab::cgroup_mount_point().unwrap();
    let session = mount.join(format!("kiam-test-session-{}", std::process::id()));
    let session = Cgroup::create(session).unwrap();
    let mut command = lab.node.command("setpriv").unwrap();
    let asked = ["--bounding-set=-sys_ptrace", AGENT, "status", "--state-dir"];
    session.adopt(command.args(asked).arg(lab.state()).stdin(Stdio::null())).unwrap();
    let output = command.output().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(b"ready\n"), "{output:?}");
    new.kill().unwrap();
    let (ready, text) = status(&lab, &[]);
    assert!(!ready && text.contains("pending: handed over to a newer agent"), "{text}");
    // The old one accepts for an instant longer, and then nobody does.
    eventually("the relieved agent still serves", || {
        pod.credentials().unwrap().error.as_deref() == Some("EPERM")
    });
    let _third = lab.agent(&[]);
    assert!(old.terminate().unwrap().success());
    for _ in 0..20 {
        lab.assert_served(&pod, "orders");
    }
    lab.assert_no_packets(&[&pod]);
}

/// As many as there are families of addresses, where the kernel lets the agent listen there at all.
fn sockets_inside_each_pod() -> u8 {
    if tells_namespaces_apart().unwrap() { 2 } else { 0 }
}

/// A successor that asks for the sockets, and nothing more until it is dropped.
fn half_a_successor(lab: &Lab, pods: u8) -> UnixStream {
    let mut stream = UnixStream::connect(lab.state().join("handover.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"kiam-handover 1\n").unwrap();
    // Their number; the sockets themselves are closed by the kernel, as nothing here takes them.
    let mut count = [0];
    stream.read_exact(&mut count).unwrap();
    let inside = sockets_inside_each_pod() * pods;
    assert_eq!(count, [2 + inside], "the pods' socket, the admin port, and those inside each pod");
    stream
}

fn is_ready((success, text): &(bool, String)) -> bool {
    *success && text.starts_with("ready\n")
}

/// Attaches the programs, with a target where nobody listens, as a successor does before it serves.
fn attach_to_nowhere(lab: &Lab) {
    let cgroup = Some(lab.node.kubepods().to_owned());
    let config = intercept::Config::new(cgroup, lab.pins());
    let target = Target { v4: NODE_V4.octets(), v4_port: 3999, ..Target::default() };
    let attach = || {
        Interception::load(&blocking(), &config, target)
            .and_then(|loaded| loaded.attach(&blocking(), &[]))
            .map(drop)
    };
    lab.node.netns().enter(attach).unwrap().unwrap();
}

#[test]
fn probe_asks_the_agent_of_its_own_container() {
    let Some(lab) = lab::node_test!() else { return };
    // To `SO_PEERCRED`, a container is a process namespace.
    let begin = || {
        let mut command = lab.node.command("unshare").unwrap();
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", AGENT]);
        Agent::start_by(command, &lab, &[]).unwrap()
    };
    let probe = |agent: &Agent| {
        let pid = agent.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        status(&lab, &["nsenter", "--pid", "--mount", "--target", children.trim()])
    };
    let mut old = begin();
    old.wait_said(SERVES, LIMIT).unwrap();
    eventually("not ready", || is_ready(&probe(&old)));
    lab.kubernetes.stop();
    let mut new = begin();
    // While it warms up it is alive, and says what it waits for; the one that serves is ready.
    eventually("the new agent does not answer", || {
        let (ready, text) = probe(&new);
        !ready && text.contains("pending: pods")
    });
    assert!(is_ready(&probe(&old)));
    lab.kubernetes.restart().unwrap();
    new.wait_said(SERVES, LIMIT).unwrap();
    eventually("not ready", || is_ready(&probe(&new)));
    eventually("the old agent is not relieved", || {
        let (ready, text) = probe(&old);
        !ready
            && text.contains("pending: handed over to a newer agent\n")
            && text.contains("pending: kernel programs attached\n")
    });
}

#[test]
fn successor_that_dies_half_way_leaves_the_old_agent_serving() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pods = three_pods(&lab);
    let load = Load::start(&lab, &pods);
    drop(half_a_successor(&lab, 3));
    // Killed while it warms up, at ever later moments, until it gets to serve.
    for pause in (1..).map(|n| Duration::from_millis(20 * n)) {
        let mut successor = lab.begin_agent(&["--port=3200"]);
        thread::sleep(pause);
        successor.freeze().unwrap();
        if successor.said("Socket taken over") || pause > Duration::from_millis(300) {
            break;
        }
        successor.kill().unwrap();
    }
    load.finish();
    assert!(!old.said(RELIEVED), "{}", old.log());
    // One that had replaced the programs: the old agent puts its own back.
    let successor = half_a_successor(&lab, 3);
    attach_to_nowhere(&lab);
    assert_eq!(pods[0].1.credentials().unwrap().error.as_deref(), Some("ECONNREFUSED"));
    drop(successor);
    old.wait_said("Kernel programs are in place", LIMIT).unwrap();
    eventually("the old agent does not serve", || {
        pods[0].1.credentials().is_ok_and(|attempt| attempt.status == Some(200))
    });
    let load = Load::start(&lab, &pods);
    let _successor = lab.agent(&[]);
    old.wait_said(RELIEVED, LIMIT).unwrap();
    load.finish();
    lab.assert_no_packets(&pods.each_ref().map(|(_, pod)| pod));
}

#[test]
fn programs_of_an_agent_that_does_not_take_over_are_left_to_it_until_it_is_gone() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    // As one with another state folder would do.
    let config = intercept::Config::new(Some(lab.node.kubepods().to_owned()), lab.pins());
    let other = intercept::prepare(&blocking(), &config).unwrap();
    attach_to_nowhere(&lab);
    agent.wait_said("did not take over from this one", LIMIT).unwrap();
    assert_eq!(agent.admin("/ready").unwrap().status, 503);
    assert!(!agent.said("Kernel programs are in place"), "{}", agent.log());
    drop(other);
    agent.wait_said("Kernel programs are in place", LIMIT).unwrap();
    agent.wait_ready(LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn of_agents_that_start_at_once_one_serves_and_hands_over_to_the_other() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = lab.pod_of("orders");
    // Ports of their own, so that not those decide.
    let flags = [&["--port=3100"][..], &["--port=3200", "--admin=127.0.0.1:3201"]];
    // A third one starts; both wait for it, and nothing is attached.
    let lock = AttachLock::take(&lab.pins()).unwrap().unwrap();
    let mut agents = flags.map(|flags| lab.begin_agent(flags));
    for agent in &mut agents {
        agent.wait_said("Another agent starts; waiting until it serves", LIMIT).unwrap();
    }
    assert!(!lab.pins().join("v2/link_kiam_connect4").exists());
    drop(lock);
    for agent in &mut agents {
        agent.wait_said(SERVES, LIMIT).unwrap();
    }
    let relieved = || agents.each_ref().map(|agent| agent.said(RELIEVED));
    eventually("no agent is relieved", || relieved().contains(&true));
    eventually("not ready", || is_ready(&status(&lab, &[])));
    for _ in 0..20 {
        lab.assert_served(&pod, "orders");
    }
    assert_ne!(relieved(), [true, true]);
    let [first, second] = &agents;
    let (first, second) = if first.said(RELIEVED) { (first, second) } else { (second, first) };
    assert!(first.said("Passed the sockets to a newer agent"), "{}", first.log());
    assert!(!second.said("Passed the sockets to a newer agent"), "{}", second.log());
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn successor_that_knows_nothing_does_not_take_over() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pods = three_pods(&lab);
    lab.kubernetes.stop();
    let mut new = lab.begin_agent(&[]);
    new.wait_said("Not taking over before pods and credentials are known", LIMIT).unwrap();
    for (role, pod) in &pods {
        lab.assert_served(pod, role);
    }
    assert!(!old.said(RELIEVED));
    // All that the old one holds, but not what a new pod wants, which the old one is not given either.
    lab.sts.stop();
    let late = lab.pod_of("payroll");
    lab.kubernetes.restart().unwrap();
    new.wait_said("Inherited credentials", LIMIT).unwrap();
    new.wait_said("Credentials not issued", LIMIT).unwrap();
    for (role, pod) in &pods {
        lab.assert_served(pod, role);
    }
    assert!(!old.said(RELIEVED));
    let load = Load::start(&lab, &pods);
    lab.sts.restart().unwrap();
    new.wait_said(SERVES, LIMIT).unwrap();
    old.wait_said(RELIEVED, LIMIT).unwrap();
    load.finish();
    lab.assert_served(&late, "payroll");
}

#[test]
fn successor_asks_sts_for_nothing_that_was_held_and_a_cold_start_for_each_role_once() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pods = three_pods(&lab);
    let keys = || pods.each_ref().map(|(_, pod)| pod.credentials().unwrap().field("AccessKeyId"));
    let held = keys();
    assert_eq!(lab.sts.requests(), 3);
    // STS may as well be away.
    lab.sts.stop();
    let mut new = lab.agent(&[]);
    old.wait_said(RELIEVED, LIMIT).unwrap();
    assert!(old.terminate().unwrap().success());
    assert_eq!(keys(), held);
    // Another session name is another session, of which nobody holds anything.
    lab.sts.restart().unwrap();
    let mut named = lab.agent(&["--session-name=other"]);
    new.wait_said(RELIEVED, LIMIT).unwrap();
    assert!(new.terminate().unwrap().success());
    assert_eq!(lab.sts.requests(), 6);
    let renewed = keys();
    assert!(renewed.iter().all(|key| !held.contains(key)));
    // Nothing was left for later.
    named.kill().unwrap();
    let _cold = lab.agent(&["--session-name=other"]);
    assert_eq!(lab.sts.requests(), 9);
    assert!(keys().iter().all(|key| !renewed.contains(key)));
}

#[test]
fn successor_of_an_agent_that_is_killed_waits_no_longer() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    lab.kubernetes.stop();
    let mut new = lab.begin_agent(&[]);
    new.wait_said("Not taking over before pods and credentials are known", LIMIT).unwrap();
    old.kill().unwrap();
    new.wait_said(SERVES, LIMIT).unwrap();
    assert_eq!(pod.credentials().unwrap().status, Some(404), "unknown yet");
    lab.kubernetes.restart().unwrap();
    new.wait_ready(LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn successor_of_an_agent_that_hangs_waits_for_its_end() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    old.freeze().unwrap();
    let mut new = lab.begin_agent(&[]);
    new.wait_said(
        "The running agent does not hand over its sockets; waiting for it to exit",
        LIMIT,
    )
    .unwrap();
    assert!(!new.said(SERVES));
    // The liveness probe has it killed.
    old.kill().unwrap();
    new.wait_said(SERVES, LIMIT).unwrap();
    new.wait_ready(LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn agent_that_hung_while_it_was_replaced_finds_out_and_leaves_the_lease() {
    let Some(lab) = lab::node_test!() else { return };
    let mut old = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    old.freeze().unwrap();
    // Nothing that the old one holds is in its way.
    let mut new = lab.begin_agent(&["--port=3200", "--admin=127.0.0.1:3201"]);
    new.wait_said(SERVES, LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
    old.thaw().unwrap();
    old.wait_said(RELIEVED, LIMIT).unwrap();
    assert!(old.terminate().unwrap().success());
    for _ in 0..20 {
        lab.assert_served(&pod, "orders");
    }
    lab.assert_no_packets(&[&pod]);
}

/// What the agent that runs answers to `attacker`, which becomes `uid`: how many bytes, and how many sockets.
fn ask_for_sockets(lab: &Lab, mut attacker: Attacker, uid: u32) -> String {
    let path = lab.state().join("handover.sock");
    let attempt = attacker.attempt(Attack::AskForSockets { path, uid }, 20_000).unwrap();
    attempt.error.unwrap_or(attempt.body)
}

#[test]
fn sockets_are_given_to_the_hosts_root_alone() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let thief = lab.pod_of("orders");
    let host = || lab.node.attacker().unwrap();
    assert_eq!(ask_for_sockets(&lab, host(), 65534), "EACCES", "by the folder");
    // What the folder's mode would have kept out.
    for (path, mode) in [(lab.state(), 0o777), (lab.state().join("handover.sock"), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    assert_eq!(ask_for_sockets(&lab, host(), 65534), "0 0", "another user");
    assert_eq!(ask_for_sockets(&lab, thief.attacker().unwrap(), 0), "0 0", "a pod's root");
    assert_eq!(
        ask_for_sockets(&lab, host(), 0),
        format!("1 {}", 2 + sockets_inside_each_pod()),
        "the host's root: two sockets, and those inside the pod"
    );
    for reason in ["its user is 65534", "belongs to a pod"] {
        assert!(agent.said(reason), "{reason}: {}", agent.log());
    }
}

#[test]
fn agents_in_pods_of_their_own_take_over_and_keep_the_nodes_role() {
    let Some(lab) = lab::node_test!() else { return };
    let agent_pod =
        |name: &str| lab.node.pod(PodSpec::new("kube-system", name).host_network()).unwrap();
    // Intercepted like any other pod, were they not the agents' own.
    let flags =
        ["--host-network-pods=intercept", "--host=10.77.0.1,fd77::1", "--metrics=127.0.0.1:3102"];
    let begin = |command| Agent::start_by(command, &lab, &flags).unwrap();
    let (first, second) = (agent_pod("kiam-agent-1"), agent_pod("kiam-agent-2"));
    let mut old = begin(first.command(AGENT).unwrap());
    old.wait_said(SERVES, LIMIT).unwrap();
    let pod = lab.served_pod("orders");
    // As a container's process, which sees its own cgroup as the root, and the other one above it.
    let mut container = second.command("unshare").unwrap();
    container.args(["--cgroup", AGENT]);
    let mut new = begin(container);
    new.wait_said(SERVES, LIMIT).unwrap();
    old.wait_said(RELIEVED, LIMIT).unwrap();
    assert_eq!(new.log().matches("Socket taken over").count(), 4, "{}", new.log());
    lab.assert_served(&pod, "orders");
    let v6 = pod.ask_once(&Options { via: Via::V6, ..Options::default() }).unwrap();
    lab.assert_role(&v6, "orders");
    for agent in [&first, &second] {
        let attempt = agent.credentials().unwrap();
        assert_eq!(attempt.field("AccessKeyId").as_deref(), Some(NODE_ACCESS_KEY), "{attempt:?}");
    }
    // Both are to be seen from either pod; each probe asks its own.
    let probe = |agent: &LabPod| {
        let mut command = agent.command(AGENT).unwrap();
        let output = command.arg("status").arg("--state-dir").arg(lab.state()).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    eventually("the new agent is not ready", || is_ready(&probe(&second)));
    assert!(probe(&first).1.contains("handed over to a newer agent"));
    assert!(old.terminate().unwrap().success());
    lab.assert_served(&pod, "orders");
    lab.assert_no_packets(&[&pod]);
}
