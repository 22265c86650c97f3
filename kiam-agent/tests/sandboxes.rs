//! Pods' sandboxes on the kernel: which namespaces get listeners, when, and when they lose them.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy knows no test helpers outside #[test] functions"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread,
    time::Duration,
};

use kiam_core::{
    blocking::Blocking,
    lifecycle::{DrainSignal, Readiness, drain},
    pods::{Pod, PodIndex, PodReader, PodUid},
};
use kiam_kernel::{
    sandboxes::{
        Config, Event, Metrics, NoListenerReason, OpenSandbox, SandboxReader, Sandboxes, State,
    },
    sys,
};
use lab::{Cgroup, LabPod, Netns, Node, PodSpec, Refusal, eventually_is};
use prometheus_client::registry::Registry;
use tokio::{runtime::Runtime, sync::mpsc, task::JoinHandle, time::Instant};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const WATCHED: &str = "watches";
/// Descriptors of the runtime and of the part under test without pods, at most.
const RUNTIME: usize = 16;
/// Tests that count this process's descriptors are alone; the others share it.
static DESCRIPTORS: RwLock<()> = RwLock::new(());

fn alone() -> RwLockWriteGuard<'static, ()> {
    // The first runtime of a process opens what all later ones use.
    drop(Runtime::new().unwrap());
    DESCRIPTORS.write().unwrap_or_else(PoisonError::into_inner)
}

/// The part under test, following the pods of a node.
struct Followed {
    events: mpsc::Receiver<Event>,
    states: SandboxReader,
    registry: Registry,
    readiness: Readiness,
    drain: DrainSignal,
    task: JoinHandle<()>,
    runtime: Runtime,
}

impl Followed {
    fn start(node: &Node, records: PodReader, inherited: Vec<TcpListener>) -> Self {
        let runtime = Runtime::new().unwrap();
        let blocking = Blocking::here().unwrap();
        let cgroup = sys::Cgroup::open(&blocking, Some(node.kubepods())).unwrap();
        // Long, so that no test passes by it.
        let sweep = Duration::from_secs(3600);
        let readiness = Readiness::default();
        let config = Config { cgroup, sweep, listens: true, watched: readiness.latch(WATCHED) };
        let mut registry = Registry::default();
        let states = SandboxReader::default();
        let metrics = Metrics::register(&mut registry, states.clone());
        let new = || {
            let _runtime = runtime.enter();
            Sandboxes::new(config, records, inherited, metrics, states.clone()).unwrap()
        };
        let sandboxes = node.netns().enter(new).unwrap();
        // Nobody may lose an event because nobody has taken the last.
        let (sender, events) = mpsc::channel(1);
        let (signal, drain) = drain();
        let task = runtime.spawn(sandboxes.run(sender, drain));
        Self { events, states, registry, readiness, drain: signal, task, runtime }
    }

    fn event(&mut self) -> Event {
        let Self { runtime, events, states, .. } = self;
        let next = async { tokio::time::timeout(LIMIT, events.recv()).await };
        let event = runtime.block_on(next);
        event.unwrap_or_else(|_| panic!("no event; {:?}", states.counts())).unwrap()
    }

    fn opened(&mut self, pod: &PodUid) -> OpenSandbox {
        match self.event() {
            Event::Opened(listener) if listener.pod == *pod => listener,
            other => panic!("{other:?} instead of listeners of {pod}"),
        }
    }

    fn closed(&mut self, pod: &PodUid) -> u64 {
        match self.event() {
            Event::Closed { pod: of, netns } if of == *pod => netns,
            other => panic!("{other:?} instead of the end of {pod}"),
        }
    }

    fn becomes(&self, pod: &PodUid, state: &State) {
        eventually_is("state of a pod", &Some(state.clone()), || self.states.state(pod));
    }

    fn without(&self, pod: &PodUid, reason: NoListenerReason) {
        self.becomes(pod, &State::Without(reason));
    }

    /// How many watches are missing, by the metric.
    fn unwatched(&self) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("kiam_sandboxes_unwatched "));
        count.unwrap().parse().unwrap()
    }
}

/// Ends it.
impl Drop for Followed {
    fn drop(&mut self) {
        self.drain.start();
        let ended = self.runtime.block_on(&mut self.task);
        assert!(ended.is_ok() || thread::panicking(), "{ended:?}");
    }
}

/// A node, what the API says of its pods, and the part under test.
struct Stage {
    followed: Followed,
    index: PodIndex,
    node: Node,
    _descriptors: Option<RwLockReadGuard<'static, ()>>,
}

impl Stage {
    fn start(test: &str) -> Option<Self> {
        let descriptors = DESCRIPTORS.read().unwrap_or_else(PoisonError::into_inner);
        Self::start_beside(test, Some(descriptors))
    }

    /// Starts it beside the tests that share `descriptors`, if any do.
    fn start_beside(test: &str, descriptors: Option<RwLockReadGuard<'static, ()>>) -> Option<Self> {
        if lab::skip(test) || lab::no_netns_cookies() {
            return None;
        }
        let node = Node::start().unwrap();
        let (index, records) = PodIndex::new();
        let followed = Followed::start(&node, records, Vec::new());
        Some(Self { followed, index, node, _descriptors: descriptors })
    }

    fn pod(&self, name: &str) -> (LabPod, PodUid) {
        let pod = self.node.pod(PodSpec::new("shop", name)).unwrap();
        let uid = PodUid::new(pod.uid());
        (pod, uid)
    }

    /// What has happened up to now has led to no event that was not taken: another pod's come next.
    fn nothing_else_came(&mut self) {
        let (pod, uid) = self.pod("marker");
        let process = Process::of(&pod);
        let netns = self.followed.opened(&uid).netns;
        drop((process, pod));
        assert_eq!(self.followed.closed(&uid), netns);
    }

    /// The API says that the pod has these addresses.
    fn record(&self, pod: &LabPod, addresses: &[IpAddr]) {
        self.index.apply(record(pod, addresses));
    }
}

fn record(pod: &LabPod, addresses: &[IpAddr]) -> Pod {
    let spec = pod.spec();
    Pod {
        addresses: addresses.to_vec(),
        host_network: spec.host_network,
        ..Pod::new(PodUid::new(pod.uid()), &spec.namespace, &spec.name)
    }
}

/// A process of a pod. Drop ends it.
struct Process(Child);

impl Process {
    /// One that only is there.
    fn idle(mut command: Command) -> Self {
        Self(command.stdin(Stdio::piped()).spawn().unwrap())
    }

    /// One that stays in the pod.
    fn of(pod: &LabPod) -> Self {
        let mut sleep = pod.command("sleep").unwrap();
        sleep.arg("600");
        Self::idle(sleep)
    }

    /// One that says when it is where it is to be.
    fn set_up(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "ready\n");
        Self(child)
    }

    fn tell(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The listeners take connections from inside the namespace, from each family that they are for.
fn answers(listener: &OpenSandbox, netns: &Netns) {
    for socket in &listener.sockets {
        let address = socket.local_addr().unwrap();
        assert_eq!(address.port(), listener.port);
        let stream = netns.enter(|| TcpStream::connect(address)).unwrap().unwrap();
        socket.set_nonblocking(false).unwrap();
        let (_, peer) = socket.accept().unwrap();
        assert_eq!(peer, stream.local_addr().unwrap());
    }
}

fn families(listener: &OpenSandbox) -> Vec<IpAddr> {
    listener.sockets.iter().map(|socket| socket.local_addr().unwrap().ip()).collect()
}

fn both() -> Vec<IpAddr> {
    vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
}

/// What happens to a pod at every start of a container.
fn stir(pod: &LabPod) {
    let cgroup = pod.slice().path().join("cri-containerd-next.scope");
    fs::create_dir(&cgroup).unwrap();
    fs::remove_dir(&cgroup).unwrap();
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn sandboxes_get_listeners_when_their_first_process_comes_and_lose_them_when_they_end() {
    let Some(mut stage) = Stage::start("sandboxes_get_listeners") else { return };
    let mut took = Vec::new();
    let mut cookies = Vec::new();
    for round in 0..20 {
        let (pod, uid) = stage.pod(&format!("p{round}"));
        stage.followed.without(&uid, NoListenerReason::NoProcess);
        let begun = Instant::now();
        let _process = Process::of(&pod);
        let listener = stage.followed.opened(&uid);
        took.push(begun.elapsed());
        assert_eq!(families(&listener), both());
        assert!(listener.port > 60999);
        answers(&listener, pod.netns());
        let (netns, port) = (listener.netns, listener.port);
        stage.followed.becomes(&uid, &State::Ready { netns, port });
        assert!(!cookies.contains(&netns));
        cookies.push(netns);
        // Whoever comes later finds the port taken, and no other.
        for address in
            [SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), ([127, 0, 0, 1], port).into()]
        {
            let bound = pod.netns().enter(|| TcpListener::bind(address)).unwrap();
            assert_eq!(bound.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
        }
        drop(pod);
        assert_eq!(stage.followed.closed(&uid), netns);
        eventually_is("state of a pod", &None, || stage.followed.states.state(&uid));
    }
    took.sort();
    println!("from fork to listeners: median {:?}, longest {:?}", took[10], took[19]);
    assert!(took[10] < Duration::from_millis(500), "{took:?}");
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &stage.followed.registry).unwrap();
    assert!(text.contains("kiam_sandboxes_ready_seconds_count 20"), "{text}");
    let sum = text.lines().find(|line| line.starts_with("kiam_sandboxes_ready_seconds_sum"));
    println!("from the notice to listeners, 20 times: {}", sum.unwrap());
    assert!(text.contains("kiam_sandboxes{state=\"ready\"} 0"), "{text}");
}

/// What others of the same user have used up, the kernel refuses.
#[test]
fn pods_are_found_and_shown_to_be_unwatched_while_the_kernel_refuses_watches() {
    let calls = [
        ("inotify_init1", libc::SYS_inotify_init1, libc::EMFILE),
        ("inotify_add_watch", libc::SYS_inotify_add_watch, libc::ENOSPC),
    ];
    for (name, call, errno) in calls {
        if lab::skip!() || lab::no_netns_cookies() {
            return;
        }
        // A filter stays with its thread.
        let refused = move || {
            let refusal = Refusal::of(call, errno).unwrap();
            let mut stage = Stage::start(name).unwrap();
            let (early, first) = stage.pod("early");
            let process = Process::of(&early);
            answers(&stage.followed.opened(&first), early.netns());
            assert_eq!(stage.followed.readiness.pending(), [WATCHED], "{name}");
            assert!(stage.followed.unwatched() > 0 && refusal.count() > 0, "{name}");
            // A pod that is known gets its processes later.
            let (late, uid) = stage.pod("late");
            stage.followed.without(&uid, NoListenerReason::NoProcess);
            let _late = Process::of(&late);
            answers(&stage.followed.opened(&uid), late.netns());
            drop((process, early));
            stage.followed.closed(&first);
            refusal.lift();
            eventually_is("missing watches", &0, || stage.followed.unwatched());
            assert!(stage.followed.readiness.is_ready(), "{name}");
            // By events again: the next sweep is an hour away.
            let (next, uid) = stage.pod("next");
            let _next = Process::of(&next);
            answers(&stage.followed.opened(&uid), next.netns());
            // Watches of what comes now are refused, and those that there are go on.
            refusal.renew(errno);
            let (last, uid) = stage.pod("last");
            let _last = Process::of(&last);
            answers(&stage.followed.opened(&uid), last.netns());
            if call == libc::SYS_inotify_add_watch {
                eventually_is("readiness", &false, || stage.followed.readiness.is_ready());
            }
            refusal.lift();
            eventually_is("readiness", &true, || stage.followed.readiness.is_ready());
        };
        thread::spawn(refused).join().unwrap();
    }
}

#[test]
fn the_runtimes_first_stage_on_the_nodes_network_is_waited_for_and_its_monitor_is_not_taken() {
    let Some(mut stage) = Stage::start("first_stage_on_the_nodes_network") else { return };
    // As runc does it: in the pod's cgroup first, in its network namespace later.
    let staged = |pod: &LabPod, wait: &str| {
        let script = format!("{wait}; exec nsenter --net={} sleep 600", pod.netns().path());
        let mut command = stage.node.netns().command("sh");
        pod.cgroup().adopt(command.args(["-c", &script])).unwrap();
        Process::idle(command)
    };
    let (quick, uid) = stage.pod("quick");
    let _quick = staged(&quick, "sleep 0.02");
    answers(&stage.followed.opened(&uid), quick.netns());

    let (slow, uid) = stage.pod("slow");
    let mut process = staged(&slow, "read line");
    thread::sleep(Duration::from_millis(500));
    process.tell();
    // No event tells of it.
    let inside = fs::metadata(slow.netns().path()).unwrap();
    let entered = || {
        use std::os::unix::fs::MetadataExt as _;
        let namespace = fs::metadata(format!("/proc/{}/ns/net", process.0.id()));
        namespace.unwrap().ino() == inside.ino()
    };
    eventually_is("it has entered", &true, entered);
    let listener = stage.followed.opened(&uid);
    answers(&listener, slow.netns());

    // CRI-O's monitor stays beside the container, and is nobody's namespace.
    let monitor = slow.slice().path().join("crio-conmon-1.scope");
    let monitor = Cgroup::create(monitor).unwrap();
    let mut command = stage.node.netns().command("sleep");
    monitor.adopt(command.arg("600")).unwrap();
    let _monitor = Process::idle(command);
    drop(process);
    assert_eq!(stage.followed.closed(&uid), listener.netns);
    stage.followed.without(&uid, NoListenerReason::NodesNamespace);
}

#[test]
fn host_network_pods_get_none() {
    let Some(mut stage) = Stage::start("host_network_pods_get_none") else { return };
    let spec = PodSpec::new("kube-system", "proxy").host_network();
    let pod = stage.node.pod(spec).unwrap();
    let uid = PodUid::new(pod.uid());
    let _process = Process::of(&pod);
    stage.followed.without(&uid, NoListenerReason::NodesNamespace);
    stage.record(&pod, &pod.ips());
    stage.followed.without(&uid, NoListenerReason::HostNetwork);
    // Nor by what it makes itself.
    let mut nested = pod.command("unshare").unwrap();
    nested.args(["-n", "sleep", "600"]);
    let _nested = Process::idle(nested);
    stir(&pod);
    stage.nothing_else_came();
}

#[test]
fn processes_that_end_all_the_time_change_nothing_and_the_last_one_closes() {
    let Some(mut stage) = Stage::start("processes_that_end") else { return };
    let (pod, uid) = stage.pod("busy");
    let mut busy = pod.command("sh").unwrap();
    busy.args(["-c", "while :; do (/bin/true &) ; done"]);
    let busy = Process::idle(busy);
    let listener = stage.followed.opened(&uid);
    for _ in 0..200 {
        stir(&pod);
    }
    answers(&listener, pod.netns());
    stage.nothing_else_came();
    drop(busy);
    assert_eq!(stage.followed.closed(&uid), listener.netns);
    stage.followed.without(&uid, NoListenerReason::NoProcess);
    // The same namespace again: the pod's next process.
    let _process = Process::of(&pod);
    assert_eq!(stage.followed.opened(&uid).netns, listener.netns);
}

#[test]
fn a_process_that_is_another_one_all_the_time_is_not_taken_for_none() {
    let Some(mut stage) = Stage::start("a_process_that_is_another_one") else { return };
    let (pod, uid) = stage.pod("hopping");
    let mut hopping = pod.command("sh").unwrap();
    // Each starts the next one and ends: by a fork, as that is fast, and now and then by a new shell, since a function that calls
    // itself ends at some depth.
    const HOP: &str =
        "hop() { n=$((n + 1)); if [ $n -lt 500 ]; then hop & else exec sh -c \"$HOP\" & fi; }; hop";
    hopping.args(["-c", HOP]).env("HOP", HOP);
    let _first = Process::idle(hopping);
    let listener = loop {
        stir(&pod);
        match stage.followed.events.try_recv() {
            Ok(Event::Opened(listener)) => break listener,
            Ok(closed) => panic!("{closed:?}"),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    };
    // As often as it takes to look in the wrong moment.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(4000) {
        stir(&pod);
    }
    stage.nothing_else_came();
    pod.slice().kill().unwrap();
    assert_eq!(stage.followed.closed(&uid), listener.netns);
}

#[test]
fn a_namespace_is_its_first_pods_until_that_ends() {
    let Some(mut stage) = Stage::start("a_namespace_is_its_first_pods") else { return };
    let (first, first_uid) = stage.pod("first");
    let (second, second_uid) = stage.pod("second");
    let _first = Process::of(&first);
    let listener = stage.followed.opened(&first_uid);
    let mut command = first.netns().command("sleep");
    second.cgroup().adopt(command.arg("600")).unwrap();
    let _second = Process::idle(command);
    stage.followed.without(&second_uid, NoListenerReason::AnotherPods(first_uid.clone()));
    stage.nothing_else_came();
    let netns = first.netns().clone();
    drop(first);
    assert_eq!(stage.followed.closed(&first_uid), listener.netns);
    let now = stage.followed.opened(&second_uid);
    assert_eq!(now.netns, listener.netns);
    answers(&now, &netns);
    // It has not the second's addresses, as turns out.
    stage.record(&second, &second.ips());
    assert_eq!(stage.followed.closed(&second_uid), listener.netns);
    stage.followed.without(&second_uid, NoListenerReason::NoAddress);
}

#[test]
fn the_pods_addresses_decide_once_they_are_known() {
    let Some(mut stage) = Stage::start("the_pods_addresses_decide") else { return };
    let (pod, uid) = stage.pod("orders");
    stage.record(&pod, &[]);
    let _process = Process::of(&pod);
    let listener = stage.followed.opened(&uid);
    stage.record(&pod, &pod.ips()[..1]);
    stage.record(&pod, &["10.99.0.1".parse().unwrap(), pod.v6().into()]);
    stage.nothing_else_came();
    let wrong: IpAddr = "10.99.0.1".parse().unwrap();
    stage.record(&pod, &[wrong]);
    assert_eq!(stage.followed.closed(&uid), listener.netns);
    stage.followed.without(&uid, NoListenerReason::NoAddress);
    let mapped = pod.v4().to_ipv6_mapped();
    stage.record(&pod, &[wrong, mapped.into()]);
    assert_eq!(stage.followed.opened(&uid).netns, listener.netns);
    // Deleted there, and still running here.
    stage.index.delete(&record(&pod, &[]));
    stir(&pod);
    stage.nothing_else_came();
}

#[test]
fn nested_namespaces_get_listeners_only_with_one_of_the_pods_addresses() {
    let Some(mut stage) = Stage::start("nested_namespaces") else { return };
    let (pod, uid) = stage.pod("docker");
    let _process = Process::of(&pod);
    let listener = stage.followed.opened(&uid);
    // In a user namespace of its own, and in a cgroup below the container's, as docker-in-docker has it.
    let inner = Cgroup::create(pod.cgroup().path().join("docker/1")).unwrap();
    let nested = |script: &str| {
        let mut command = pod.netns().command("unshare");
        let script = format!("ip link set lo up; {script}; echo ready; exec sleep 600");
        inner.adopt(command.args(["-U", "-r", "-n", "sh", "-c", &script])).unwrap();
        Process::set_up(command)
    };
    let _other = nested(":");
    stir(&pod);
    stage.nothing_else_came();
    stage.record(&pod, &pod.ips());
    stir(&pod);
    let ready = State::Ready { netns: listener.netns, port: listener.port };
    stage.followed.becomes(&uid, &ready);
    stage.nothing_else_came();
    let own = nested(&format!("ip address add {}/32 dev lo", pod.v4()));
    stir(&pod);
    let second = stage.followed.opened(&uid);
    assert_ne!(second.netns, listener.netns);
    stage.followed.becomes(&uid, &ready);
    drop(own);
    stir(&pod);
    assert_eq!(stage.followed.closed(&uid), second.netns);
}

#[test]
fn a_pod_in_a_user_namespace_is_a_pod_like_any_other() {
    let Some(mut stage) = Stage::start("a_pod_in_a_user_namespace") else { return };
    let (pod, uid) = stage.pod("rootless");
    let mut command = stage.node.netns().command("unshare");
    let address = pod.v4();
    let script = format!(
        "ip link set lo up; ip address add {address}/32 dev lo; echo ready; exec sleep 600"
    );
    pod.cgroup().adopt(command.args(["-U", "-r", "-n", "sh", "-c", &script])).unwrap();
    stage.record(&pod, &pod.ips());
    let process = Process::set_up(command);
    stir(&pod);
    let listener = stage.followed.opened(&uid);
    assert_eq!(families(&listener), both(), "{:?}", stage.followed.states.state(&uid));
    drop(process);
    assert_eq!(stage.followed.closed(&uid), listener.netns);
}

#[test]
fn lo_that_is_down_is_waited_for() {
    let Some(mut stage) = Stage::start("lo_that_is_down") else { return };
    let (pod, uid) = stage.pod("orders");
    pod.netns().ip("link set lo down").unwrap();
    let _process = Process::of(&pod);
    stage.followed.without(&uid, NoListenerReason::LoopbackDown);
    pod.netns().ip("link set lo up").unwrap();
    stir(&pod);
    answers(&stage.followed.opened(&uid), pod.netns());
}

#[test]
fn without_ipv6_there_is_ipv4() {
    let Some(mut stage) = Stage::start("without_ipv6_there_is_ipv4") else { return };
    let (pod, uid) = stage.pod("orders");
    pod.netns().sysctl("ipv6/conf/all/disable_ipv6", "1").unwrap();
    let _process = Process::of(&pod);
    let listener = stage.followed.opened(&uid);
    assert_eq!(families(&listener), [IpAddr::from(Ipv4Addr::LOCALHOST)]);
    answers(&listener, pod.netns());
}

#[test]
fn ports_are_those_that_the_pod_leaves() {
    let Some(mut stage) = Stage::start("ports_are_those_that_the_pod_leaves") else { return };
    for (range, taken, expected) in [
        ("1024 65533", vec![(Ipv6Addr::LOCALHOST.into(), 65535)], Some(65534)),
        ("1024 65533", vec![(IpAddr::from(Ipv4Addr::UNSPECIFIED), 65534)], Some(65535)),
        ("1026 65535", vec![(Ipv6Addr::UNSPECIFIED.into(), 1025)], Some(1024)),
        ("1025 65535", vec![(Ipv4Addr::LOCALHOST.into(), 1024)], Some(914)),
        ("1024 65535", vec![(IpAddr::from(Ipv4Addr::UNSPECIFIED), 914)], Some(915)),
        ("1 65535", vec![], None),
    ] {
        let (pod, uid) = stage.pod("orders");
        // Else the range can't begin below 1024.
        pod.netns().sysctl("ipv4/ip_unprivileged_port_start", "0").unwrap();
        pod.netns().sysctl("ipv4/ip_local_port_range", range).unwrap();
        let occupied: Vec<TcpListener> =
            taken.iter().map(|address| pod.netns().listen((*address).into()).unwrap()).collect();
        let _process = Process::of(&pod);
        match expected {
            Some(port) => {
                let listener = stage.followed.opened(&uid);
                assert_eq!(
                    (listener.port, families(&listener)),
                    (port, both()),
                    "{range} {taken:?}"
                );
                drop(pod);
                stage.followed.closed(&uid);
            }
            // The namespace is the pod's all the same.
            None => {
                let opened = stage.followed.opened(&uid);
                assert!(opened.sockets.is_empty());
                let known = State::Known { netns: opened.netns, reason: NoListenerReason::NoPort };
                stage.followed.becomes(&uid, &known);
            }
        }
        drop(occupied);
    }
}

#[test]
fn a_sandbox_that_is_made_anew_is_followed_into_its_new_namespace() {
    let Some(mut stage) = Stage::start("a_sandbox_that_is_made_anew") else { return };
    let (pod, uid) = stage.pod("orders");
    stage.record(&pod, &pod.ips());
    let process = Process::of(&pod);
    let first = stage.followed.opened(&uid);
    let netns = Netns::create().unwrap();
    netns.ip("address add 10.77.9.9/32 dev lo").unwrap();
    let cgroup = Cgroup::create(pod.slice().path().join("cri-containerd-anew.scope")).unwrap();
    let mut command = netns.command("sleep");
    cgroup.adopt(command.arg("600")).unwrap();
    drop(process);
    assert_eq!(stage.followed.closed(&uid), first.netns);
    let _process = Process::idle(command);
    // Until the API has its new address it is none of the pod's.
    stage.followed.without(&uid, NoListenerReason::NoAddress);
    stage.record(&pod, &["10.77.9.9".parse().unwrap()]);
    let second = stage.followed.opened(&uid);
    assert_ne!(second.netns, first.netns);
    answers(&second, &netns);
}

#[test]
fn the_next_agent_goes_on_with_the_same_listeners() {
    let Some(mut stage) = Stage::start("the_next_agent_goes_on") else { return };
    let pods: Vec<_> = (0..3).map(|n| stage.pod(&format!("p{n}"))).collect();
    let _processes: Vec<_> = pods.iter().map(|(pod, _)| Process::of(pod)).collect();
    let mut listeners: Vec<OpenSandbox> = (0..3)
        .map(|_| match stage.followed.event() {
            Event::Opened(listener) => listener,
            closed => panic!("{closed:?}"),
        })
        .collect();
    // One of a pod that is gone, and half a pair, which is opened anew.
    let stray = Netns::create().unwrap().listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    listeners[2].sockets.remove(1);
    let mut inherited = vec![stray];
    let sockets = listeners.iter().flat_map(|listener| &listener.sockets);
    inherited.extend(sockets.map(|socket| socket.try_clone().unwrap()));
    let mut next = Followed::start(&stage.node, stage.index.reader(), inherited);
    for _ in 0..3 {
        let Event::Opened(again) = next.event() else { panic!("closed") };
        let before = listeners.iter().find(|listener| listener.netns == again.netns).unwrap();
        assert_eq!((&again.pod, again.port), (&before.pod, before.port));
        assert_eq!(families(&again), families(before));
    }
}

#[test]
fn the_pods_cgroup_that_is_made_anew_is_followed() {
    let Some(mut stage) = Stage::start("the_pods_cgroup_that_is_made_anew") else { return };
    let (pod, uid) = stage.pod("orders");
    let process = Process::of(&pod);
    stage.followed.opened(&uid);
    drop((process, pod));
    stage.followed.closed(&uid);
    let root = stage.node.kubepods();
    fs::remove_dir(root.join("kubepods-burstable.slice")).unwrap();
    fs::remove_dir(root).unwrap();
    fs::create_dir(root).unwrap();
    let (pod, uid) = stage.pod("orders");
    let _process = Process::of(&pod);
    answers(&stage.followed.opened(&uid), pod.netns());
}

#[test]
fn events_wait_for_whoever_takes_them_and_the_end_does_not() {
    let Some(mut stage) = Stage::start("events_wait") else { return };
    let pods: Vec<_> = (0..8).map(|n| stage.pod(&format!("p{n}"))).collect();
    let processes: Vec<_> = pods.iter().map(|(pod, _)| Process::of(pod)).collect();
    let first = |pods: &[(LabPod, PodUid)], states: &SandboxReader| {
        let ready = |uid| matches!(states.state(uid), Some(State::Ready { .. }));
        pods.iter().any(|(_, uid)| ready(uid))
    };
    eventually_is("a pod is ready", &true, || first(&pods, &stage.followed.states));
    let mut uids: Vec<PodUid> = pods.iter().map(|(_, uid)| uid.clone()).collect();
    for _ in 0..pods.len() {
        match stage.followed.event() {
            Event::Opened(listener) => uids.retain(|uid| *uid != listener.pod),
            Event::Closed { pod, .. } => panic!("{pod} was closed"),
        }
    }
    assert!(uids.is_empty(), "{uids:?}");
    drop((processes, pods));
    // Eight ends, and room for one.
    stage.followed.event();
}

/// As few parts as a pod can have, many of which are soon made.
struct Small {
    uid: PodUid,
    netns: Netns,
    slice: Cgroup,
    process: Option<Process>,
}

impl Small {
    fn start(node: &Node, number: usize) -> Self {
        let uid = format!("{number:08x}-0000-4000-8000-{:012x}", std::process::id());
        let slice = Cgroup::create(node.kubepods().join(format!("burstable/pod{uid}"))).unwrap();
        let mut pod =
            Self { uid: PodUid::new(&uid), netns: Netns::create().unwrap(), slice, process: None };
        let container = Cgroup::create(pod.slice.path().join("1")).unwrap();
        let mut command = pod.netns.command("sleep");
        container.adopt(command.arg("600")).unwrap();
        pod.process = Some(Process::idle(command));
        std::mem::forget(container);
        pod
    }

    fn many(node: &Node, numbers: std::ops::Range<usize>) -> Vec<Self> {
        thread::scope(|scope| {
            let parts: Vec<_> = (0..4)
                .map(|part| {
                    let own = numbers.clone().filter(move |number| number % 4 == part);
                    scope.spawn(move || {
                        own.map(|number| Self::start(node, number)).collect::<Vec<_>>()
                    })
                })
                .collect();
            parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
        })
    }
}

fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_node_full_of_pods_has_its_listeners_within_a_second_and_keeps_none_of_what_ends() {
    let _alone = alone();
    if lab::skip!() || lab::no_netns_cookies() {
        return;
    }
    // More by hand, for what 1,000 pods cost.
    let count = std::env::var("KIAM_TEST_PODS").map_or(250, |text| text.parse().unwrap());
    let node = Node::start().unwrap();
    let empty = descriptors();
    let pods = Small::many(&node, 0..count);
    let (own, memory) = (descriptors() - empty, resident());
    let (_index, records) = PodIndex::new();
    let begun = Instant::now();
    let mut followed = Followed::start(&node, records, Vec::new());
    let mut listeners = Vec::new();
    while listeners.len() < count {
        match followed.event() {
            Event::Opened(listener) => listeners.push(listener),
            Event::Closed { pod, .. } => panic!("{pod} was closed"),
        }
    }
    let took = begun.elapsed();
    println!(
        "{count} pods: {took:?}, {} descriptors, {} KiB of memory",
        descriptors() - own - empty,
        resident() - memory
    );
    let allowed = kiam_kernel::sandboxes::descriptors(count);
    assert!(descriptors() - own - empty <= RUNTIME + allowed);
    assert!(count > 250 || took < Duration::from_secs(1), "{took:?}");
    for listener in listeners.iter().step_by(25) {
        let pod = pods.iter().find(|pod| pod.uid == listener.pod).unwrap();
        answers(listener, &pod.netns);
    }
    drop(pods);
    drop(listeners);
    for _ in 0..count {
        assert!(matches!(followed.event(), Event::Closed { .. }));
    }
    eventually_is("descriptors", &true, || descriptors() <= empty + RUNTIME);
    drop(followed);
    eventually_is("descriptors", &empty, descriptors);
}

#[test]
fn pods_that_come_and_go_all_the_time_leave_nothing() {
    let _alone = alone();
    let Some(mut stage) = Stage::start_beside("pods_that_come_and_go", None) else { return };
    // Its descriptors are open once it watches.
    eventually_is("readiness", &true, || stage.followed.readiness.is_ready());
    let before = descriptors();
    let begun = Instant::now();
    let count = 250;
    for first in (0..count).step_by(25) {
        let pods = thread::scope(|scope| {
            let making = scope.spawn(|| Small::many(&stage.node, first..first + 25));
            let mut open: Vec<OpenSandbox> = Vec::new();
            while open.len() < 25 {
                match stage.followed.event() {
                    Event::Opened(listener) => open.push(listener),
                    Event::Closed { pod, .. } => panic!("{pod} was closed"),
                }
            }
            let pods = making.join().unwrap();
            for pod in &pods {
                assert_eq!(open.iter().filter(|listener| listener.pod == pod.uid).count(), 1);
            }
            pods
        });
        drop(pods);
        for _ in 0..25 {
            assert!(matches!(stage.followed.event(), Event::Closed { .. }));
        }
    }
    println!("{count} pods came and went in {:?}", begun.elapsed());
    eventually_is("descriptors", &before, descriptors);
    assert_eq!(stage.followed.states.counts().values().sum::<u64>(), 0);
}
