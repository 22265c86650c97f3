//! `kubectl kiam explain`: finds a pod, its node and the agent there, and shows what that agent says of the pod.

use serde::Serialize;
use serde_json::Value;

use super::{
    advice::advice,
    ask::Asker,
    findings::{Finding, of_agent},
    fleet::{AgentPod, Fleet, Place},
    output::Report,
    table::{Cell, Screen, Tone},
    trouble::Trouble,
};
use crate::{
    admin::NodeStatus,
    cluster::{FailureKind, OperatorClient, RequestFailure},
    explain::Explanation,
};
use kiam_core::names::PodName;

/// How many pods are suggested instead of one that does not exist.
const ALIKE: usize = 5;
/// How many characters a suggested name has in common with the name that was asked for.
const BEGINNING: usize = 3;

/// What was found of a pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ExplainReport {
    namespace: String,
    name: String,
    phase: Option<String>,
    node: Option<String>,
    agent: Option<String>,
    served: bool,
    /// Why it is not served, in a sentence.
    cause: Option<String>,
    /// What to do.
    remedies: Vec<String>,
    /// What is wrong with the node's agent.
    agent_findings: Vec<Finding>,
    /// What the agent says.
    explanation: Option<Explanation>,
}

/// The agent that has a pod, and what the API says of the pod.
pub(super) struct Placed {
    pub(super) agent: AgentPod,
    pub(super) node: String,
    phase: String,
}

/// Why a pod has no agent that could be asked.
pub(super) struct Unplaced {
    pub(super) phase: Option<String>,
    pub(super) node: Option<String>,
    pub(super) cause: String,
    pub(super) remedy: String,
}

/// Explains one pod.
pub(super) async fn explain(
    asker: &Asker,
    place: &Place,
    pod: &PodName,
) -> Result<ExplainReport, RequestFailure> {
    let mut report = ExplainReport {
        namespace: pod.namespace().to_owned(),
        name: pod.name().to_owned(),
        phase: None,
        node: None,
        agent: None,
        served: false,
        cause: None,
        remedies: Vec::new(),
        agent_findings: Vec::new(),
        explanation: None,
    };
    match find(&asker.client, place, pod).await? {
        Ok(placed) => report.ask(asker, placed).await,
        Err(Unplaced { phase, node, cause, remedy }) => {
            (report.phase, report.node, report.cause) = (phase, node, Some(cause));
            report.remedies.push(remedy);
        }
    }
    Ok(report)
}

/// Finds the agent that has `pod`.
pub(super) async fn find(
    client: &OperatorClient,
    place: &Place,
    pod: &PodName,
) -> Result<Result<Placed, Unplaced>, RequestFailure> {
    let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace(), pod.name());
    let object = match client.get(&path).await {
        Ok(object) => object,
        Err(failure) if failure.kind == FailureKind::NotFound => {
            return Ok(Err(missing(client, pod).await));
        }
        Err(failure) => return Err(failure),
    };
    let status = &object["status"];
    let phase = status["phase"].as_str().unwrap_or("Unknown").to_owned();
    let Some(node) = object["spec"]["nodeName"].as_str().map(str::to_owned) else {
        let cause = format!("the pod is {phase} and on no node{}", why_pending(status));
        let remedy =
            "no agent has it before it is scheduled: see `kubectl describe pod`".to_owned();
        return Ok(Err(Unplaced { phase: Some(phase), node: None, cause, remedy }));
    };
    let unplaced = |Trouble { cause, remedy, .. }, phase, node: &str| {
        let cause = format!("no agent answers for it on node {node}: {cause}");
        Unplaced { phase: Some(phase), node: Some(node.to_owned()), cause, remedy }
    };
    Ok(match Fleet::agent_of(client, place, &node).await? {
        Ok(agent) => Ok(Placed { agent, node, phase }),
        Err(trouble) => Err(unplaced(trouble, phase, &node)),
    })
}

/// What the scheduler, or a container, waits for.
fn why_pending(status: &Value) -> String {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let mut unscheduled = conditions.filter(|it| it["status"] == "False");
    let message = unscheduled.find_map(|it| it["message"].as_str());
    message.map(|message| format!(": {message}")).unwrap_or_default()
}

/// The pod does not exist; others of its namespace may be meant.
async fn missing(client: &OperatorClient, pod: &PodName) -> Unplaced {
    let (namespace, name) = (pod.namespace(), pod.name());
    let objects = client.list(&format!("/api/v1/namespaces/{namespace}/pods"), None).await;
    let names = objects.unwrap_or_default();
    let names = names.iter().filter_map(|object| object["metadata"]["name"].as_str());
    let beginning = |other: &str| {
        other.bytes().zip(name.bytes()).take_while(|(one, other)| one == other).count()
    };
    let mut alike: Vec<_> = names.filter(|other| beginning(other) >= BEGINNING).collect();
    alike.sort_by_key(|other| (std::cmp::Reverse(beginning(other)), *other));
    alike.truncate(ALIKE);
    let remedy = match alike.as_slice() {
        [] => format!("see `kubectl get pods --namespace={namespace}`"),
        alike => format!("pods with such a name: {}", alike.join(", ")),
    };
    let cause =
        format!("there is no pod {name} in namespace {namespace}: it was deleted, or never was");
    Unplaced { phase: None, node: None, cause, remedy }
}

// === impl ExplainReport ===

impl ExplainReport {
    /// Asks the agent of the pod, and how the agent is.
    async fn ask(&mut self, asker: &Asker, placed: Placed) {
        let Placed { agent, node, phase } = placed;
        let pod = format!("{}/{}", self.namespace, self.name);
        let words = ["explain", &pod, "--output=json"];
        let explanation = asker.ask_json::<Explanation>(&agent, &words);
        let status = asker.ask_json::<NodeStatus>(&agent, &["status", "--output=json"]);
        let (explanation, status) = tokio::join!(explanation, status);
        self.agent = Some(agent.at.pod);
        self.agent_findings = status.as_ref().map(of_agent).unwrap_or_default();
        match explanation {
            Ok(explanation) => self.explained(explanation),
            Err(Trouble { cause, remedy, .. }) => {
                self.cause = Some(format!("no agent answers for it on node {node}: {cause}"));
                self.remedies.push(remedy);
            }
        }
        (self.node, self.phase) = (Some(node), Some(phase));
    }

    fn explained(&mut self, explanation: Explanation) {
        self.served = explanation.served;
        if explanation.pods.is_empty() {
            let cause = "the node's agent does not know the pod, which the API server has";
            self.cause = Some(cause.to_owned());
            self.remedies.push("its watch of pods is behind: see `kubectl kiam status`".to_owned());
        }
        for pod in &explanation.pods {
            if !self.served {
                self.cause = pod["answer"].as_str().map(str::to_owned);
            }
            self.remedies.extend(advice(pod));
        }
        self.explanation = Some(explanation);
    }
}

impl Report for ExplainReport {
    fn text(&self, screen: Screen) -> String {
        let mut text = String::new();
        let place = match (&self.node, &self.agent) {
            (Some(node), Some(agent)) => format!(" on node {node}; asked its agent {agent}"),
            (Some(node), None) => format!(" on node {node}"),
            _ => String::new(),
        };
        let mut line = |name: &str, says: &str, tone| {
            let says = Cell::plain(says).to_string();
            for (number, part) in screen.wrapped(&says, 16).iter().enumerate() {
                let name = if number == 0 { name } else { "" };
                text += &format!("{name:15} {}\n", screen.painted(part, tone));
            }
        };
        // A pod that does not exist has none.
        if let Some(phase) = &self.phase {
            line("phase", &(phase.clone() + &place), Tone::Plain);
        }
        match self.explanation.as_ref().filter(|explanation| !explanation.pods.is_empty()) {
            None => line("pod", &format!("{}/{}", self.namespace, self.name), Tone::Plain),
            Some(explanation) => {
                for page in explanation.text.lines() {
                    let (name, says) = page.split_at_checked(16).unwrap_or((page, ""));
                    line(name.trim_end(), says, Tone::Plain);
                }
            }
        }
        if let Some(cause) = &self.cause {
            line("cause", cause, Tone::Bad);
        } else {
            line("cause", "none: it gets credentials", Tone::Good);
        }
        for remedy in &self.remedies {
            line("do", remedy, Tone::Plain);
        }
        for Finding { cause, remedy } in &self.agent_findings {
            line("agent", cause, Tone::Warn);
            line("  do", remedy, Tone::Faint);
        }
        text
    }

    fn is_good(&self) -> bool {
        self.served
    }
}
