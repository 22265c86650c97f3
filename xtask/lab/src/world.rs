//! A node with all its neighbours: what a whole agent needs around it.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::Result;

use super::{
    NODE_V4,
    fake::{
        Place,
        imds::{self, Imds},
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord},
        sts::Sts,
    },
    node::{NODE_NAME, Node},
    pod::{LabPod, PodSpec},
};

/// Beyond the node, where the API server and STS are.
pub(super) const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 254);
/// How long after the sandbox the kubelet tells the API its addresses; really seconds.
const PUBLISH_AFTER: Duration = Duration::from_millis(300);

/// A node, its API server, STS and metadata service.
#[derive(Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Lab {
    pub kubernetes: Kubernetes,
    pub sts: Sts,
    pub imds: Imds,
    pub node: Node,
}

// === impl Lab ===

impl Lab {
    /// Starts it, with no pods and no agent.
    pub fn start() -> Result<Self> {
        Self::around(Node::start()?)
    }

    /// Starts what is around `node`.
    pub fn around(node: Node) -> Result<Self> {
        let outside = || Place::inside(node.imds_netns(), (OUTSIDE_V4, 0).into());
        let kubernetes = Kubernetes::start(outside())?;
        let sts = Sts::start(outside(), imds::NODE_ACCESS_KEY)?;
        let imds = Imds::start(node.imds_netns())?;
        Ok(Self { kubernetes, sts, imds, node })
    }

    /// Schedules a pod, makes its sandbox and, a little later, publishes its addresses, as the kubelet does.
    pub fn pod(&self, spec: PodSpec) -> Result<LabPod> {
        let pod = self.unpublished_pod(spec)?;
        let (store, record) = (self.kubernetes.store(), running(&pod));
        thread::spawn(move || {
            thread::sleep(PUBLISH_AFTER);
            // By then it may be deleted, or another of its name be there.
            store.update_pod(&record);
        });
        Ok(pod)
    }

    /// [`Self::pod`] of the namespace `shop`, named like its role.
    ///
    /// # Panics
    ///
    /// When its sandbox can't be made.
    #[track_caller]
    #[must_use]
    pub fn pod_of(&self, role: &str) -> LabPod {
        self.pod(PodSpec::new("shop", role).role(role)).expect("the sandbox can be made")
    }

    /// A pod that runs and whose addresses the API does not know, until [`Self::publish`].
    pub fn unpublished_pod(&self, spec: PodSpec) -> Result<LabPod> {
        let spec = self.schedule(spec)?;
        let mut pod = self.node.pod(spec)?;
        pod.pause()?;
        Ok(pod)
    }

    /// Tells the API of a pod that is to run here; the answer, with its UID, is what to make the sandbox of.
    pub fn schedule(&self, spec: PodSpec) -> Result<PodSpec> {
        let spec = spec.with_uid()?;
        self.kubernetes.ensure_namespace(&NamespaceRecord::new(&spec.namespace));
        self.kubernetes.apply_pod(&record(&spec));
        Ok(spec)
    }

    /// Tells the API the pod's addresses.
    pub fn publish(&self, pod: &LabPod) {
        self.kubernetes.apply_pod(&running(pod));
    }

    /// Tells the API addresses that are not the pod's own.
    pub fn publish_with(&self, pod: &LabPod, addresses: &[IpAddr]) {
        self.publish_of(pod.spec(), addresses);
    }

    /// Tells the API the addresses of a pod that a container runtime made.
    pub fn publish_of(&self, spec: &PodSpec, addresses: &[IpAddr]) {
        let mut record = record(spec).running(addresses);
        record.host_ip = Some(NODE_V4.into());
        self.kubernetes.apply_pod(&record);
    }

    /// Deletes the pod, sandbox first.
    pub fn delete(&self, pod: LabPod) {
        let (namespace, name) = (pod.spec().namespace.clone(), pod.spec().name.clone());
        drop(pod);
        self.kubernetes.delete_pod(&namespace, &name);
    }

    /// The kubeconfig for the API server.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        let path = self.node.folder().join("kubeconfig");
        self.kubernetes.write_kubeconfig(&path)?;
        Ok(path)
    }
}

/// The ARN of a role in the lab's account.
#[must_use]
pub fn role_arn(role: &str) -> String {
    format!("{}{role}", role_base_arn())
}

/// What `--role-base-arn` is set to.
#[must_use]
pub fn role_base_arn() -> String {
    format!("arn:aws:iam::{}:role/", imds::ACCOUNT)
}

fn record(spec: &PodSpec) -> PodRecord {
    let uid = spec.uid.as_deref().unwrap_or_default();
    let mut record = PodRecord::scheduled(&spec.namespace, &spec.name, uid, NODE_NAME);
    record.annotations.clone_from(&spec.annotations);
    record.host_network = spec.host_network;
    record.controller.clone_from(&spec.controller);
    record.service_account.clone_from(&spec.service_account);
    record
}

fn running(pod: &LabPod) -> PodRecord {
    let mut record = record(pod.spec()).running(&pod.ips());
    record.host_ip = Some(NODE_V4.into());
    record
}
