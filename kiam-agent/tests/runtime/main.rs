//! The agent beside a real container runtime, containerd with runc and CNI plugins, driven as the kubelet drives it:
//! whether the listener inside a pod is there before any process of the pod's containers, and what else becomes of
//! sandboxes.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy knows no test helpers outside #[test] functions"
)]

mod lives;
mod starts;

use std::net::IpAddr;

use aya::maps::{HashMap, Map, MapData};
use lab::{
    self, Agent, Lab, PodSpec, READY_LIMIT, eventually_is, role_arn,
    runtime::{self, Containerd, Exited, Handler, Kubelet, Sandbox},
};

/// A node with an agent, which is ready and will make no connects of its own, and a runtime. They end in this order.
struct Stage {
    agent: Agent,
    containerd: Containerd,
    lab: Lab,
}

// === impl Stage ===

impl Stage {
    /// `None`, with the reason told, where a machine can't have one.
    fn set(test: &str, further: &[&str]) -> Option<Self> {
        if lab::skip(test) || runtime::skip(test) {
            return None;
        }
        let lab = Lab::start().unwrap();
        let containerd = Containerd::start(&lab.node).unwrap();
        let agent = start(&lab, further);
        Some(Self { agent, containerd, lab })
    }

    fn kubelet(&self) -> Kubelet {
        self.containerd.kubelet().unwrap()
    }

    /// What the API is told before the kubelet hears of the pod.
    fn schedule(&self, name: &str, role: &str) -> PodSpec {
        self.lab.schedule(PodSpec::new("shop", name).role(role)).unwrap()
    }

    /// Tells the API a sandbox's address, as the kubelet does once the runtime has told it that.
    fn publish(&self, kubelet: &Kubelet, spec: &PodSpec, sandbox: &Sandbox) -> IpAddr {
        let address = kubelet.address(sandbox).unwrap().unwrap();
        self.lab.publish_of(spec, &[address]);
        address
    }

    /// Ends the pod, first on the node.
    fn delete(&self, kubelet: &Kubelet, spec: &PodSpec, sandbox: Sandbox) {
        kubelet.remove(sandbox).unwrap();
        self.lab.kubernetes.delete_pod(&spec.namespace, &spec.name);
    }

    fn assert_served(&self, exited: &Exited, role: &str) {
        let answer: serde_json::Value = serde_json::from_str(&exited.output)
            .unwrap_or_else(|error| panic!("not {role}'s: {error}: {exited:?}"));
        let key = answer["AccessKeyId"].as_str().unwrap_or_default();
        let owner = self.lab.sts.owner(key).map(|issued| issued.role);
        assert_eq!((exited.code, owner), (0, Some(role_arn(role))), "{exited:?}");
    }

    /// Connects that went to the node's listener, and those to listeners inside pods.
    fn ways(&self) -> (u64, u64) {
        (self.agent.verdicts("redirected"), self.agent.verdicts("redirected_inside"))
    }

    /// Pods that the agent says it listens inside of.
    fn inside(&self) -> u64 {
        self.agent.metric("kiam_sandboxes{state=\"ready\"}")
    }

    /// Network namespaces that the kernel sends connects inside of.
    fn namespaces(&self) -> usize {
        let map = MapData::from_pin(self.lab.pins().join("v2/SANDBOXES")).unwrap();
        let sandboxes: HashMap<_, u64, kiam_common::client::Sandbox> =
            Map::HashMap(map).try_into().unwrap();
        let sandboxes = sandboxes.iter().map(Result::unwrap);
        sandboxes.filter(|(_, sandbox)| sandbox.v4 != 0).count()
    }
}

/// An agent that serves, alone or as the successor of the one that did.
fn start(lab: &Lab, further: &[&str]) -> Agent {
    let flags: Vec<&str> = ["--selftest-interval=1h"].iter().chain(further).copied().collect();
    lab.agent(&flags)
}

/// A command that asks once for the credentials of `role`. It is one static binary, which connects as the first thing
/// it does.
fn ask(role: &str) -> [String; 4] {
    let url = format!("http://169.254.169.254/latest/meta-data/iam/security-credentials/{role}");
    ["/bin/busybox", "wget", "-qO-", &url].map(ToOwned::to_owned)
}
