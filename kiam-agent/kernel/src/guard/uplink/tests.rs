//! The filters of kernels without tcx, which later kernels have as well, and links whose pins can't be made.

use std::{net::IpAddr, os::unix::fs::symlink, thread, time::Duration};

use kiam_common::redirect::Target;
use lab::{
    IMDS_V4, LabPod, Node, PodSpec,
    fake::imds::Imds,
    pod_client::attack::{Attack, frame},
};
use tokio::time::Instant;

use super::*;
use crate::{
    guard::GuardConfig,
    intercept::{Config, HostNetworkPods, Interception, uninstall},
};
use kiam_core::blocking::Blocking;

/// No address of the node: what its kernel answers must not count.
const SOURCE: [u8; 4] = [10, 77, 9, 9];

/// A program, as a new agent loads it, with that agent's others, which are held as long as it lives.
fn load(node: &Node) -> (UplinkProgram, Interception) {
    let config = Config {
        host_network: HostNetworkPods::Intercept,
        guard: GuardConfig { uplink: true, ..GuardConfig::default() },
        ..Config::new(Some(node.kubepods().to_owned()), node.bpffs().join("kiam"))
    };
    let load = || {
        let blocking = Blocking::here().unwrap();
        Interception::load(&blocking, &config, Target::default())
            .and_then(|it| it.attach(&blocking, &[]))
    };
    let parts = node.netns().enter(load).unwrap().unwrap();
    (parts.uplink.unwrap(), parts.programs)
}

/// Sends to the IMDS, past the node's own stack; that it is denied is one of the answers.
fn send(pod: &LabPod) {
    let (from, to) = (SOURCE.into(), IMDS_V4.into());
    let attack = Attack::Frame { way: frame::Way::Dgram, from, to, interface: None };
    pod.attacker().unwrap().attempt(attack, 1000).unwrap();
}

#[test]
fn filters_do_it_below_kernel_6_6_are_replaced_and_go() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let imds = Imds::start(node.imds_netns()).unwrap();
    let pod = node.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
    let arrived = || imds.packets_from(IpAddr::from(SOURCE));
    for agent in ["the first agent", "a later agent"] {
        let (program, programs) = load(&node);
        let mut program = UplinkProgram { tcx: false, ..program };
        let new = node.netns().enter(|| program.keep()).unwrap().unwrap();
        assert_eq!(new, ["eth0"], "{agent}");
        assert_eq!(node.netns().enter(|| program.keep()).unwrap().unwrap(), [""; 0], "{agent}");
        assert_eq!(program.count(), 1);
        send(&pod);
        drop((program, programs));
        send(&pod);
        assert_eq!(arrived(), 0, "{agent}");
    }
    let removed = node.netns().enter(|| uninstall(&node.bpffs().join("kiam"))).unwrap().unwrap();
    let filters = removed.iter().filter(|what| what.contains("egress of eth0")).count();
    assert_eq!(filters, 1, "{removed:?}");
    send(&pod);
    let started = Instant::now();
    while arrived() == 0 {
        assert!(started.elapsed() < Duration::from_secs(10), "the packet does not arrive at all");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A turn. One that has just ended may still be held by a process that another test has forked and that has not begun its
/// program.
fn turn(node: &Node) -> AttachLock {
    let started = Instant::now();
    loop {
        if let Some(turn) = AttachLock::take(&node.bpffs().join("kiam")).unwrap() {
            return turn;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "somebody else has it");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_pin_that_can_not_be_made_ends_no_link_and_is_tried_again() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let imds = Imds::start(node.imds_netns()).unwrap();
    let pod = node.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
    let (mut program, _programs) = load(&node);
    assert_eq!(node.netns().enter(|| program.keep()).unwrap().unwrap(), ["eth0"]);
    let [(pin, _)] = &pinned(&program.pins).unwrap()[..] else { panic!("one uplink") };
    fs::remove_file(pin).unwrap();
    // Something is in its place that is no link, and can't be seen either.
    symlink("nowhere", pin).unwrap();
    for _ in 0..2 {
        let error = node.netns().enter(|| program.restore()).unwrap().unwrap_err();
        assert!(error.to_string().contains("link_uplink_"), "{error}");
        send(&pod);
        assert_eq!(imds.packets_from(IpAddr::from(SOURCE)), 0);
    }
    fs::remove_file(pin).unwrap();
    assert_eq!(node.netns().enter(|| program.restore()).unwrap().unwrap(), ["eth0"]);
    assert!(pin.exists());
    assert_eq!(node.netns().enter(|| program.restore()).unwrap().unwrap(), [""; 0]);
    // An agent that hangs in its turn keeps it away for two seconds.
    let _turn = turn(&node);
    node.detach_link(pin).unwrap();
    let mut restored = Vec::new();
    let started = Instant::now();
    while restored.is_empty() {
        assert!(started.elapsed() < Duration::from_secs(10), "it is not back");
        restored = node.netns().enter(|| program.restore()).unwrap().unwrap();
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(restored, ["eth0"]);
    assert!(started.elapsed() > Duration::from_secs(1), "an agent that does not hang has its time");
    send(&pod);
    assert_eq!(imds.packets_from(IpAddr::from(SOURCE)), 0);
}
