//! Says which listener a pod's connections go to.

use std::sync::{Arc, OnceLock};

use kiam_core::pods::Pod;
use kiam_kernel::{
    intercept::ListenerPath,
    sandboxes::{NoListenerReason, SandboxReader, State},
};

/// How each pod's connections reach the agent, once that is known. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    rules: Arc<OnceLock<Rules>>,
    /// The pods' sandboxes.
    pub sandboxes: SandboxReader,
}

/// The settings that decide about the paths.
#[derive(Clone, Copy, Debug)]
struct Rules {
    path: ListenerPath,
    only_known: bool,
}

// === impl Paths ===

impl Paths {
    /// Sets `--path`, and whether pods connect only from network namespaces that are known to be theirs. Until then pods are
    /// served at the node listener; the first call counts.
    pub fn set(&self, path: ListenerPath, only_known: bool) {
        let _ = self.rules.set(Rules { path, only_known });
    }

    /// How `pod`'s connections reach the agent, and why.
    ///
    /// # Errors
    ///
    /// Why they don't.
    pub fn of(&self, pod: &Pod) -> Result<String, String> {
        let Some(rules) = self.rules.get() else { return Ok("node".to_owned()) };
        let node_or = |why: &str, denied| match denied && !pod.host_network {
            true => Err(format!("denied: {why}")),
            false => Ok(format!("node: {why}")),
        };
        let pod_local = rules.path == ListenerPath::PodLocal;
        let otherwise = |why: &str| node_or(why, pod_local || rules.only_known);
        match self.sandboxes.of(pod) {
            None => otherwise("no cgroup of the pod was seen"),
            Some(State::Known { reason: NoListenerReason::NodePath, .. }) => Ok("node".to_owned()),
            Some(State::Known { reason, .. }) => node_or(&reason.to_string(), pod_local),
            Some(state @ State::Ready { .. }) => Ok(format!("pod-local: {state}")),
            // The kernel knows the namespace alone: their connects go to that pod's listener.
            Some(state @ State::Without(NoListenerReason::AnotherPods(_))) => {
                Err(format!("refused: {state}"))
            }
            Some(state) => otherwise(&state.to_string()),
        }
    }
}
