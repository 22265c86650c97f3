//! The filters of kernels without tcx, which later kernels have as well.

use std::{net::IpAddr, thread, time::Duration};

use kiam_common::redirect::Target;
use tokio::time::Instant;
use xtask::lab::{LabPod, Node, PodSpec, fake::imds::Imds, skip};

use super::*;
use crate::intercept::{Config, GuardConfig, HostNetworkPods, Interception, uninstall};

/// No address of the node: what its kernel answers must not count.
const SOURCE: [u8; 4] = [10, 77, 9, 9];

/// A program that works by filters, as a new agent loads it.
fn load(node: &Node) -> UplinkProgram {
    let config = Config {
        host_network: HostNetworkPods::Intercept,
        guard: GuardConfig { uplink: true, ..GuardConfig::default() },
        ..Config::new(Some(node.kubepods().to_owned()), node.bpffs().join("kiam"))
    };
    let load = || Interception::load(&config, Target::default()).and_then(|it| it.attach(&[]));
    let parts = node.netns().enter(load).unwrap().unwrap();
    UplinkProgram { tcx: false, ..parts.uplink.unwrap() }
}

/// Sends an IPv4 header and no more to the IMDS, past the node's own stack.
fn send(pod: &LabPod) {
    let packet = "import socket\n\
        head=bytes.fromhex('4500001400010000400600000a4d0909a9fea9fe')\n\
        s=socket.socket(socket.AF_PACKET,socket.SOCK_DGRAM)\n\
        try: s.sendto(head,('eth0',0x0800,0,0,b'\\xff'*6))\n\
        except OSError: pass";
    let mut python = pod.command("python3").unwrap();
    assert!(python.args(["-c", packet]).status().unwrap().success());
}

#[test]
fn filters_do_it_below_kernel_6_6_are_replaced_and_go() {
    if skip("filters_do_it_below_kernel_6_6_are_replaced_and_go") {
        return;
    }
    let node = Node::start().unwrap();
    let imds = Imds::start(node.imds_netns()).unwrap();
    let pod = node.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
    let arrived = || imds.packets_from(IpAddr::from(SOURCE));
    for agent in ["the first agent", "a later agent"] {
        let mut program = load(&node);
        let new = node.netns().enter(|| program.keep()).unwrap().unwrap();
        assert_eq!(new, ["eth0"], "{agent}");
        assert_eq!(node.netns().enter(|| program.keep()).unwrap().unwrap(), [""; 0], "{agent}");
        assert_eq!(program.count(), 1);
        send(&pod);
        drop(program);
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
