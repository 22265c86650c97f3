//! Every kernel program, with each set of constants that the agent gives it, loaded and attached by the agent's own code.
//!
//! `cargo xtask test kernels` runs this on other kernels, as process 1's only child, and reads a line for each set.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsFd as _,
    path::PathBuf,
    process,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use kiam_common::redirect::Target;
use kiam_core::{blocking::Blocking, lifecycle::Readiness};
use kiam_kernel::{
    guard::{self, Guard, GuardConfig},
    intercept::{self, Config, HostNetworkPods, Interception, ListenerPath, Mode},
    sys::{Cgroup as PodsCgroup, cookie_of},
};
use lab::{Cgroup, Netns, cgroup_mount_point};
use prometheus_client::{encoding::text::encode, registry::Registry};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const PORT: u16 = 3100;
/// How often the namespace is asked for beside a pod that binds.
const ROUNDS: usize = 30;

/// Before each set's result: what the run on other kernels looks for.
const MARK: &str = "kiam-kernels:";

/// A folder on a BPF file system of its own.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount() -> Self {
        let folder = PathBuf::from(format!("/tmp/kiam-programs-{}", process::id()));
        fs::create_dir_all(&folder).expect("the folder can be made");
        mount("bpf", &folder, "bpf", MountFlags::empty(), None).expect("it can be mounted");
        Self(folder)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// The agent's sets of constants: by name, what differs from its defaults.
fn sets(default: &Config) -> Vec<(&'static str, Config, Target)> {
    let v4 = Target { v4: [127, 0, 0, 1], v4_port: PORT, ..Target::default() };
    let both = Target { v6: [1; 16], v6_port: PORT, ..v4 };
    let with = |change: &dyn Fn(&mut Config)| {
        let mut config = default.clone();
        change(&mut config);
        config
    };
    let all = GuardConfig { route: None, skb: true, uplink: true };
    vec![
        ("defaults", default.clone(), v4),
        ("both families", default.clone(), both),
        ("--guard=skb,uplink", with(&|config| config.guard = all), both),
        (
            "--host-network-pods=intercept",
            with(&|config| config.host_network = HostNetworkPods::Intercept),
            both,
        ),
        ("--mode=observe", with(&|config| config.mode = Mode::Observe), both),
        ("--path=node", with(&|config| config.path = ListenerPath::Node), both),
        ("--path=pod-local", with(&|config| config.path = ListenerPath::PodLocal), both),
        ("--identity=source-ip", with(&|config| config.attested = false), both),
        ("kernel log", with(&|config| (config.log, config.guard) = (true, all)), both),
    ]
}

/// Loads, attaches, guards; whether uplinks are guarded.
fn start(config: &Config, target: Target, listener: &TcpListener) -> Result<bool, String> {
    let failed = |error: intercept::Error| error.to_string();
    let blocking = Blocking::here().expect("no runtime runs on this thread");
    let _lock = intercept::prepare(&blocking, config).map_err(failed)?;
    let mut parts = Interception::load(&blocking, config, target)
        .and_then(|loaded| loaded.attach(&blocking, &[listener.as_fd()]))
        .map_err(failed)?;
    let (mut registry, readiness) = (Registry::default(), Readiness::default());
    let metrics = guard::Metrics::register(&mut registry);
    let shown = (readiness.detail("guard route"), readiness.latch("older connections ended"));
    let uplink = parts.uplink.take();
    let guard = GuardConfig { route: None, ..config.guard };
    let start = Guard::start(guard, false, &parts.cgroup, uplink, metrics, shown);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let guarded = runtime.expect("a runtime can be made").block_on(start);
    guarded.map(drop).map_err(|error| error.to_string())?;
    let mut shown = String::new();
    encode(&mut shown, &registry).map_err(|error| error.to_string())?;
    let count = shown.lines().find_map(|line| line.strip_prefix("kiam_guard_uplinks "));
    Ok(count.is_some_and(|count| count != "0"))
}

/// What this kernel must make of a set.
fn expected(config: &Config, told: bool) -> Result<bool, &'static str> {
    match config.path {
        ListenerPath::PodLocal if !told => Err("--path=pod-local needs kernel 5.14"),
        _ => Ok(config.guard.uplink),
    }
}

#[test]
fn every_program_loads_and_attaches_with_each_set_of_constants() {
    if lab::skip!() {
        return;
    }
    // With an uplink that leads nowhere.
    let netns = Netns::create().unwrap();
    netns.ip("link add up0 type veth peer name up1").unwrap();
    for change in
        ["link set up0 up", "address add 10.9.0.1/24 dev up0", "route add default dev up0"]
    {
        netns.ip(change).unwrap();
    }
    let failures = netns.enter(load_all).unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn load_all() -> Vec<String> {
    let bpffs = Bpffs::mount();
    let pods = cgroup_mount_point().expect("cgroup2 is mounted");
    let pods = pods.join(format!("kiam-programs-{}", process::id()));
    let pods = Cgroup::create(pods).expect("a cgroup can be made");
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))).expect("free");
    let told = cookie_of(&listener).is_ok();
    let default = Config {
        attested: true,
        path: ListenerPath::Auto,
        ..Config::new(Some(pods.path().to_owned()), PathBuf::new())
    };
    let mut failures = Vec::new();
    for (number, (name, config, target)) in sets(&default).into_iter().enumerate() {
        let config = Config { bpffs: bpffs.0.join(number.to_string()), ..config };
        let result = start(&config, target, &listener);
        let as_expected = match (&result, expected(&config, told)) {
            (Ok(guarded), Ok(expected)) => *guarded == expected,
            (Err(text), Err(expected)) => text.contains(expected),
            _ => false,
        };
        let shown = match (&result, as_expected) {
            (Ok(_), true) => "loaded".to_owned(),
            (Err(_), true) => "refused at the start, as documented".to_owned(),
            _ => format!("FAILED: {result:?}"),
        };
        println!("{MARK} {name}: {shown}");
        if !as_expected {
            failures.push(format!("{name}: {result:?}"));
        }
        // Its links go with their pins.
        intercept::uninstall(&config.bpffs).expect("it can be uninstalled");
    }
    failures
}

/// What an agent asks a program at bind(2) where the kernel does not tell it.
#[test]
fn a_program_at_bind_tells_the_network_namespace() {
    if lab::skip!() {
        return;
    }
    let pods = cgroup_mount_point().unwrap();
    let pods = pods.join(format!("kiam-namespace-{}", process::id()));
    let pods = Cgroup::create(pods).unwrap();
    let learned = || {
        let blocking = Blocking::here().unwrap();
        let cgroup = PodsCgroup::open(&blocking, Some(pods.path())).unwrap();
        intercept::own_namespace(&cgroup).unwrap()
    };
    let (one, other) = (Netns::create().unwrap(), Netns::create().unwrap());
    let [first, again] = [(); 2].map(|()| one.enter(learned).unwrap());
    assert_eq!(first, again);
    assert_ne!(first, other.enter(learned).unwrap());
    let told = one
        .udp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
        .and_then(|socket| Ok(cookie_of(socket)?));
    if let Ok(told) = told {
        assert_eq!(first, told);
    }
    println!("{MARK} the node's network namespace: learned");
}

/// A program at bind(2) of the mount's root sees the binds of all pods.
#[test]
fn pods_that_bind_without_a_pause_are_never_taken_for_the_node() {
    if lab::skip!() {
        return;
    }
    let path = cgroup_mount_point().unwrap();
    let pods = Cgroup::create(path.join(format!("kiam-binds-{}", process::id()))).unwrap();
    let learned = || {
        let blocking = Blocking::here().unwrap();
        let cgroup = PodsCgroup::open(&blocking, Some(pods.path())).unwrap();
        intercept::own_namespace(&cgroup).unwrap()
    };
    let (node, pod) = (Netns::create().unwrap(), Netns::create().unwrap());
    let [nodes, pods_own] = [&node, &pod].map(|netns| netns.enter(learned).unwrap());
    assert_ne!(nodes, pods_own);
    let (over, binds) = (AtomicBool::new(false), AtomicU64::new(0));
    let bind = || {
        while !over.load(Ordering::Relaxed) {
            let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            drop((UdpSocket::bind(any).unwrap(), TcpListener::bind(any).unwrap()));
            binds.fetch_add(2, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| pod.enter(bind).unwrap());
        }
        let rounds: Vec<_> = (0..ROUNDS).map(|_| node.enter(learned).unwrap()).collect();
        over.store(true, Ordering::Relaxed);
        assert_eq!(rounds, [nodes; ROUNDS], "not {pods_own}");
    });
    println!("{} binds of a pod in {ROUNDS} rounds", binds.load(Ordering::Relaxed));
    assert!(binds.load(Ordering::Relaxed) > 100 * ROUNDS as u64);
}
