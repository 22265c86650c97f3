//! The nodes of a cluster, and the agent's pod of each.

use std::collections::HashMap;

use serde_json::Value;

use super::trouble::{State, Trouble};
use crate::cluster::{ContainerName, FailureKind, OperatorClient, RequestFailure};
use kiam_core::telemetry::times;

/// The agent's container.
const CONTAINER: &str = "kiam-agent";
/// Restarts of a container within which it counts as crashing while it waits.
const CRASHES: u64 = 3;

/// Where the agents are.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) namespace: String,
    pub(super) selector: String,
}

/// A node, with its agent.
#[derive(Clone, Debug)]
pub(super) struct FleetNode {
    pub(super) name: String,
    pub(super) agent: Result<AgentPod, Trouble>,
}

/// The pod of a node's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentPod {
    pub(super) at: ContainerName,
    /// Why no command can be run there, or none soon.
    pub(super) trouble: Option<Trouble>,
    node: String,
    is_ready: bool,
    is_ending: bool,
    created: String,
}

/// All nodes by name, and what could not be found out.
#[derive(Clone, Debug)]
pub(super) struct Fleet {
    pub(super) nodes: Vec<FleetNode>,
    pub(super) warnings: Vec<String>,
}

// === impl Fleet ===

impl Fleet {
    /// Finds all nodes and agents, or those of the nodes `only`. Nodes that can't be listed are those of the agents' pods.
    pub(super) async fn find(
        client: &OperatorClient,
        place: &Place,
        only: &[String],
    ) -> Result<Self, RequestFailure> {
        let pods = agents(client, place);
        let nodes = client.list("/api/v1/nodes", None);
        let (mut pods, nodes) = tokio::try_join!(pods, async { Ok(nodes.await) })?;
        let mut warnings = Vec::new();
        let nodes = nodes.unwrap_or_else(|failure| {
            warnings.push(format!("nodes without an agent are not shown: {failure}"));
            pods.keys().map(|name| serde_json::json!({ "metadata": { "name": name } })).collect()
        });
        let is_empty = pods.is_empty();
        let nodes = nodes.iter().filter_map(|node| {
            let name = node["metadata"]["name"].as_str()?.to_owned();
            let agent = pods.remove(&name).ok_or_else(|| absence(node, place));
            Some(FleetNode { name, agent })
        });
        let mut nodes: Vec<_> = nodes.collect();
        // Pods of nodes that are gone, or came meanwhile.
        nodes.extend(pods.into_iter().map(|(name, agent)| FleetNode { name, agent: Ok(agent) }));
        if is_empty {
            let Place { namespace, selector } = place;
            warnings.push(format!(
                "no agent's pod in namespace {namespace} with the labels {selector}: see --agent-namespace and --agent-selector"
            ));
        }
        if !only.is_empty() {
            nodes.retain(|node| only.contains(&node.name));
            let mut unknown: Vec<_> = only.iter().collect();
            unknown.retain(|name| !nodes.iter().any(|node| node.name == **name));
            unknown.dedup();
            nodes.extend(unknown.into_iter().map(|name| FleetNode {
                name: name.clone(),
                agent: Err(Trouble::new(
                    State::NoAgent,
                    format!("there is no node {name}"),
                    "see `kubectl get nodes`",
                )),
            }));
        }
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { nodes, warnings })
    }

    /// The agent of one node.
    pub(super) async fn agent_of(
        client: &OperatorClient,
        place: &Place,
        node: &str,
    ) -> Result<Result<AgentPod, Trouble>, RequestFailure> {
        let mut pods = agents(client, place).await?;
        if let Some(agent) = pods.remove(node) {
            return Ok(Ok(agent));
        }
        let object = match client.get(&format!("/api/v1/nodes/{node}")).await {
            Ok(object) => object,
            Err(failure) if failure.kind == FailureKind::NotFound => {
                let cause = format!("there is no node {node}");
                return Ok(Err(Trouble::new(State::NoAgent, cause, "see `kubectl get nodes`")));
            }
            // Without the right to read nodes, it is not known why.
            Err(_) => Value::Null,
        };
        Ok(Err(absence(&object, place)))
    }
}

/// The agents' pods by node; of several, as while one takes over, the one that serves or will.
async fn agents(
    client: &OperatorClient,
    place: &Place,
) -> Result<HashMap<String, AgentPod>, RequestFailure> {
    let path = format!("/api/v1/namespaces/{}/pods", place.namespace);
    let pods = client.list(&path, Some(&place.selector)).await?;
    let mut agents: HashMap<String, AgentPod> = HashMap::new();
    for agent in pods.iter().filter_map(AgentPod::read) {
        let is_better = agents.get(&agent.node).is_none_or(|known| agent.rank() > known.rank());
        if is_better {
            agents.insert(agent.node.clone(), agent);
        }
    }
    Ok(agents)
}

/// Why a node has no agent.
fn absence(node: &Value, place: &Place) -> Trouble {
    let labels = &node["metadata"]["labels"];
    let none = |cause: String, remedy: &str| Trouble::new(State::NoAgent, cause, remedy);
    if labels["eks.amazonaws.com/compute-type"] == "fargate" {
        let cause = "Fargate's nodes run no DaemonSets".to_owned();
        return none(cause, "give the pod its role by IRSA, or run it on another node");
    }
    if let Some(os) = labels["kubernetes.io/os"].as_str().filter(|os| *os != "linux") {
        return none(format!("the node runs {os}"), "the agent runs on Linux alone");
    }
    let taints = node["spec"]["taints"].as_array().into_iter().flatten().filter_map(|taint| {
        let (key, effect) = (taint["key"].as_str()?, taint["effect"].as_str()?);
        // The DaemonSet's controller tolerates these by itself.
        (!key.starts_with("node.kubernetes.io/") && effect != "PreferNoSchedule").then(|| {
            match taint["value"].as_str().filter(|value| !value.is_empty()) {
                Some(value) => format!("{key}={value}:{effect}"),
                None => format!("{key}:{effect}"),
            }
        })
    });
    let taints: Vec<String> = taints.collect();
    let namespace = &place.namespace;
    if taints.is_empty() {
        let cause = format!("no pod of the agent in namespace {namespace} is on the node");
        return none(
            cause,
            "see `kubectl describe daemonset`: its nodeSelector and affinity, and whether its pods are admitted",
        );
    }
    none(
        format!("no pod of the agent is on the node, which has the taint {}", taints.join(", ")),
        "let the DaemonSet tolerate the taint: pods there reach no agent",
    )
}

// === impl AgentPod ===

impl AgentPod {
    fn read(pod: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (metadata, status) = (&pod["metadata"], &pod["status"]);
        let name = text(&metadata["name"])?;
        let node = text(&pod["spec"]["nodeName"])?;
        let at = ContainerName {
            namespace: text(&metadata["namespace"])?,
            pod: name.clone(),
            container: CONTAINER.to_owned(),
        };
        Some(Self {
            at,
            trouble: trouble(&name, &node, status),
            node,
            is_ready: container(status, "containerStatuses")["ready"] == true,
            is_ending: metadata["deletionTimestamp"].is_string(),
            created: text(&metadata["creationTimestamp"]).unwrap_or_default(),
        })
    }

    /// The one with the highest is asked.
    fn rank(&self) -> (bool, bool, bool, &str) {
        (!self.is_ending, self.is_ready, self.trouble.is_none(), &self.created)
    }
}

fn container<'a>(status: &'a Value, list: &str) -> &'a Value {
    let all = status[list].as_array().into_iter().flatten();
    let mut own = all.filter(|it| it["name"] == CONTAINER);
    own.next().unwrap_or(&Value::Null)
}

/// Why no command can be run in a pod of this status.
fn trouble(pod: &str, node: &str, status: &Value) -> Option<Trouble> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let inits = status["initContainerStatuses"].as_array().into_iter().flatten();
    let waits_for = inits.filter(|it| it["ready"] != true).map(|it| text(&it["name"])).next();
    let own = container(status, "containerStatuses");
    if own["state"]["running"].is_object() {
        return None;
    }
    let (waiting, last) = (&own["state"]["waiting"], &own["lastState"]["terminated"]);
    let ended = if last.is_object() { last } else { &own["state"]["terminated"] };
    let restarts = own["restartCount"].as_u64().unwrap_or_default();
    let reason = text(&waiting["reason"]);
    if ended.is_object()
        && (reason == "CrashLoopBackOff" || restarts >= CRASHES || reason.is_empty())
    {
        let code = ended["exitCode"].as_i64().unwrap_or_default();
        let why = text(&ended["reason"]);
        let cause = format!(
            "the agent {pod} ended with status {code} ({why}), and was restarted {}",
            times(restarts)
        );
        let remedy = format!("see `kubectl kiam logs --previous {node}`");
        return Some(Trouble::new(State::Crashing, cause, remedy));
    }
    let message = match (waits_for, reason.as_str(), text(&waiting["message"]).as_str()) {
        (Some(init), _, _) => format!("its init container {init} has not ended"),
        (None, "", _) => format!("its pod is {}{}", text(&status["phase"]), unscheduled(status)),
        (None, reason, "") => reason.to_owned(),
        (None, reason, message) => format!("{reason}: {message}"),
    };
    Some(Trouble::new(
        State::Starting,
        format!("{pod} has not started: {message}"),
        "see `kubectl describe pod` of it",
    ))
}

/// What the scheduler says.
fn unscheduled(status: &Value) -> String {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let mut scheduled =
        conditions.filter(|it| it["type"] == "PodScheduled" && it["status"] == "False");
    let message = scheduled.next().and_then(|it| it["message"].as_str());
    message.map(|message| format!(": {message}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, container: &Value) -> Value {
        json!({
            "metadata": {
                "namespace": "kube-system", "name": name,
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": { "nodeName": "n1" },
            "status": { "phase": "Running", "containerStatuses": [container] },
        })
    }

    #[test]
    fn a_container_that_does_not_run_says_why() {
        let waiting = |reason: &str, message: &str| json!({ "waiting": { "reason": reason, "message": message } });
        let ended = json!({ "terminated": { "exitCode": 1, "reason": "Error" } });
        for (state, last, restarts, expected) in [
            (json!({ "running": {} }), ended.clone(), 9, None),
            (
                waiting("CrashLoopBackOff", "back-off"),
                ended.clone(),
                5,
                Some((State::Crashing, "ended with status 1 (Error), and was restarted 5 times")),
            ),
            (ended.clone(), Value::Null, 0, Some((State::Crashing, "status 1"))),
            (
                waiting("ImagePullBackOff", "no such image"),
                Value::Null,
                0,
                Some((State::Starting, "a has not started: ImagePullBackOff: no such image")),
            ),
            (waiting("ContainerCreating", ""), Value::Null, 0, Some((State::Starting, "Creating"))),
        ] {
            let container = json!({
                "name": "kiam-agent", "state": state, "lastState": last, "restartCount": restarts,
            });
            let agent = AgentPod::read(&pod("a", &container)).unwrap();
            match (&agent.trouble, expected) {
                (None, None) => {}
                (Some(trouble), Some((state, part))) => {
                    assert_eq!(trouble.state, state, "{trouble:?}");
                    assert!(trouble.cause.contains(part), "{trouble:?}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn of_two_agents_of_a_node_the_one_that_serves_is_asked() {
        let running = |ready: bool| json!({ "name": "kiam-agent", "state": { "running": {} }, "ready": ready });
        let mut ending = pod("ending", &running(true));
        ending["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:01Z");
        let agents = [ending, pod("starting", &running(false)), pod("serving", &running(true))];
        let agents = agents.iter().filter_map(AgentPod::read);
        let best = agents.max_by(|a, b| a.rank().cmp(&b.rank())).unwrap();
        assert_eq!(best.at.pod, "serving");
    }

    #[test]
    fn a_node_without_an_agent_says_why() {
        let place = Place { namespace: "kube-system".to_owned(), selector: String::new() };
        let label = |name: &str, value: &str| json!({ "metadata": { "labels": { name: value } } });
        let taints = |key: &str| json!({ "spec": { "taints": [{ "key": key, "value": "x", "effect": "NoExecute" }] } });
        for (node, part) in [
            (label("eks.amazonaws.com/compute-type", "fargate"), "Fargate"),
            (label("kubernetes.io/os", "windows"), "runs windows"),
            (taints("gpu"), "the taint gpu=x:NoExecute"),
            (taints("node.kubernetes.io/not-ready"), "in namespace kube-system"),
        ] {
            let trouble = absence(&node, &place);
            assert!(trouble.cause.contains(part), "{trouble:?}");
        }
    }
}
