//! The taint that keeps pods from a node until the agent there is ready.
//!
//! Nodes register with it: until the agent's first start after a boot, nothing is intercepted
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/>).

use std::{fmt, str::FromStr, time::Duration};

use kube::{
    api::{GetParams, Patch, PatchParams},
    core::Request,
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::{backoff::Backoff, describe};
use kiam_core::lifecycle::Readiness;

const NODES: &str = "/api/v1/nodes";
/// The deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest prefix and name of a key
/// (<https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set>).
const LONGEST: (usize, usize) = (253, 63);

/// The key of a taint, which is before its `=` or `:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaintKey(String);

/// A text is not the key of a taint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give the key alone, without value and effect, such as kiam.example.com/agent-not-ready")]
pub struct InvalidTaintKey;

/// The task that removes the taints of one key from one node.
pub struct StartupTaint {
    pub(super) client: kube::Client,
    pub(super) node: String,
    pub(super) key: TaintKey,
}

/// Why the taint was not removed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{}", describe(.0))]
    Request(#[from] kube::Error),
    #[error("the Kubernetes API does not answer within {} s", DEADLINE.as_secs())]
    Deadline(#[from] tokio::time::error::Elapsed),
    #[error("apply deploy/startup-taint, which grants it: {}", describe(.0))]
    Forbidden(kube::Error),
    #[error("the node changed meanwhile")]
    Conflict,
}

// === impl TaintKey ===

impl FromStr for TaintKey {
    type Err = InvalidTaintKey;

    fn from_str(text: &str) -> Result<Self, InvalidTaintKey> {
        let (prefix, name) = text.split_once('/').map_or((None, text), |(a, b)| (Some(a), b));
        let is_good = |part: &str, longest: usize| {
            let ends = [part.bytes().next(), part.bytes().last()];
            (1..=longest).contains(&part.len())
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
                && ends.iter().flatten().all(u8::is_ascii_alphanumeric)
        };
        let good =
            prefix.is_none_or(|prefix| is_good(prefix, LONGEST.0)) && is_good(name, LONGEST.1);
        good.then(|| Self(text.to_owned())).ok_or(InvalidTaintKey)
    }
}

impl fmt::Display for TaintKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl StartupTaint ===

impl StartupTaint {
    /// Removes the taint once the agent is ready, with as many attempts as needed, and shows the state there. It is fine if
    /// there is none.
    pub async fn remove_once_ready(self, readiness: Readiness) {
        readiness.ready().await;
        let detail = readiness.detail("startup taint");
        let (mut backoff, mut warned) = (Backoff::new(), false);
        loop {
            match self.try_remove().await {
                Ok(removed) => {
                    if removed {
                        info!(node = self.node, taint = %self.key, "Removed the startup taint");
                    }
                    return detail.set(format!("{}: not on the node", self.key));
                }
                Err(Failure::Conflict) => {}
                Err(failure) => {
                    detail.set(format!("{} keeps pods from the node: {failure}", self.key));
                    if !std::mem::replace(&mut warned, true) {
                        warn!(error = %failure, node = self.node, taint = %self.key, "Removing the startup taint failed; retrying");
                    }
                }
            }
            sleep(backoff.next()).await;
        }
    }

    /// Removes the taint, and returns whether there was one.
    async fn try_remove(&self) -> Result<bool, Failure> {
        let nodes = Request::new(NODES);
        let get =
            nodes.get(&self.node, &GetParams::default()).map_err(kube::Error::BuildRequest)?;
        // Not k8s-openapi's type, which would drop unknown fields of a taint.
        let node: Value = answered(self.client.request(get)).await?;
        let taints = node["spec"]["taints"].as_array().map_or(&[][..], Vec::as_slice);
        let is_ours = |taint: &&Value| taint["key"] == self.key.0;
        if !taints.iter().any(|taint| is_ours(&taint)) {
            return Ok(false);
        }
        let rest: Vec<&Value> = taints.iter().filter(|taint| !is_ours(taint)).collect();
        // The list is replaced as a whole; the version makes sure that no other change is lost.
        let version = json!({ "resourceVersion": node["metadata"]["resourceVersion"] });
        let patch = Patch::Merge(json!({ "metadata": version, "spec": { "taints": rest } }));
        let patch = nodes.patch(&self.node, &PatchParams::default(), &patch);
        answered(self.client.request(patch.map_err(kube::Error::BuildRequest)?)).await?;
        Ok(true)
    }
}

async fn answered(
    request: impl Future<Output = Result<Value, kube::Error>>,
) -> Result<Value, Failure> {
    timeout(DEADLINE, request).await?.map_err(|error| match &error {
        kube::Error::Api(status) if status.code == 403 => Failure::Forbidden(error),
        kube::Error::Api(status) if status.code == 409 => Failure::Conflict,
        _ => Failure::Request(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_no_whole_taint() {
        for good in ["kiam", "kiam.example.com/agent-not-ready", "a/b_c.d"] {
            assert_eq!(good.parse::<TaintKey>().map(|key| key.to_string()), Ok(good.to_owned()));
        }
        let long = "a".repeat(64);
        let bad = ["", "/", "a/", "/a", "a/b/c", "a=b", "a:NoSchedule", "-a", "a.", "ä", &long];
        for bad in bad {
            assert_eq!(bad.parse::<TaintKey>(), Err(InvalidTaintKey), "{bad:?}");
        }
    }
}
