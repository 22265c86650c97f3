//! Runs the agent's own commands in the agents' pods, many at once, each with a limit.

use std::time::Duration;

use futures::{StreamExt as _, stream};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{
    fleet::{AgentPod, FleetNode},
    trouble::{State, Trouble},
};
use crate::{
    cluster::{CommandOutput, LogPart, OperatorClient},
    config,
};

/// The program in the agent's image, which has no shell.
const PROGRAM: &str = "kiam-agent";
/// The exit status of a command line that the program does not take.
const USAGE: i32 = config::USAGE as i32;
/// The lines of a former life's log among which its last error is looked for.
const LAST_LINES: i64 = 50;
/// The longest wait for that log.
const LOG_LIMIT: Duration = Duration::from_secs(5);

/// Asks agents.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) client: OperatorClient,
    /// The longest wait for one node.
    pub(super) limit: Duration,
    /// How many are asked at once.
    pub(super) parallel: usize,
}

// === impl Asker ===

impl Asker {
    /// What a command of the agent printed, if it said something: its exit status is part of the answer.
    pub(super) async fn ask(
        &self,
        agent: &AgentPod,
        words: &[&str],
    ) -> Result<CommandOutput, Trouble> {
        if let Some(trouble) = &agent.trouble {
            return Err(self.explained(agent, trouble.clone()).await);
        }
        let pod = &agent.at.pod;
        let command: Vec<String> =
            [PROGRAM].iter().chain(words).map(|word| (*word).to_owned()).collect();
        let output = timeout(self.limit, self.client.run(&agent.at, &command)).await;
        let output = output
            .map_err(|_| Trouble::late(self.limit, pod))?
            .map_err(|failure| Trouble::of_exec(&failure, &agent.at.namespace, pod))?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let remedy = "see `kubectl kiam logs` of the node";
        match output.code {
            Some(USAGE) => Err(Trouble::new(
                State::Old,
                format!(
                    "the agent of {pod} has no command `{}`: it is of another version",
                    words[0]
                ),
                "update the agent, or use the kubectl-kiam of its version",
            )),
            Some(0 | 1) if !output.stdout.is_empty() => Ok(output),
            Some(1) if said.contains("did not answer within") => Err(Trouble::new(
                State::NoAnswer,
                format!("the agent's process hangs: {said}"),
                "the kubelet restarts it after three failed probes; until then pods are denied once its lease has ended",
            )),
            Some(_) => Err(Trouble::new(State::Failed, format!("{pod}: {said}"), remedy)),
            None => Err(Trouble::new(
                State::Failed,
                format!("no command can be run in {pod}: {}", output.message),
                remedy,
            )),
        }
    }

    /// As [`Self::ask`], and reads what was printed as JSON.
    pub(super) async fn ask_json<T: DeserializeOwned>(
        &self,
        agent: &AgentPod,
        words: &[&str],
    ) -> Result<T, Trouble> {
        let output = self.ask(agent, words).await?;
        serde_json::from_slice(&output.stdout).map_err(|error| {
            let cause = format!("the answer of {} can't be read: {error}", agent.at.pod);
            Trouble::new(State::Old, cause, "use the kubectl-kiam of the agent's version")
        })
    }

    /// As [`Self::ask_json`], of the agent of `node`, if it has one.
    pub(super) async fn ask_node<T: DeserializeOwned>(
        &self,
        node: &FleetNode,
        words: &[&str],
    ) -> Result<T, Trouble> {
        let agent = node.agent.as_ref().map_err(Clone::clone)?;
        self.ask_json(agent, words).await
    }

    /// What `ask` finds at each node, at so many at once, in the nodes' order. A slow node delays no other one's turn.
    pub(super) async fn each<'a, T, F: Future<Output = T>>(
        &self,
        nodes: &'a [FleetNode],
        ask: impl Fn(&'a FleetNode) -> F,
    ) -> Vec<T> {
        let asked = nodes.iter().enumerate().map(|(at, node)| {
            let answer = ask(node);
            async move { (at, answer.await) }
        });
        let mut answers: Vec<_> =
            stream::iter(asked).buffer_unordered(self.parallel).collect().await;
        answers.sort_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    /// `trouble`, with the last error that a crashing agent logged.
    async fn explained(&self, agent: &AgentPod, mut trouble: Trouble) -> Trouble {
        if trouble.state != State::Crashing {
            return trouble;
        }
        let last = async {
            for previous in [true, false] {
                let part = LogPart { previous, tail: Some(LAST_LINES), ..LogPart::default() };
                let Ok(lines) = self.client.log(&agent.at, part).await else { continue };
                let lines: Vec<String> = lines.filter_map(async |line| line.ok()).collect().await;
                if let Some(error) = last_error(&lines) {
                    return Some(error);
                }
            }
            None
        };
        if let Ok(Some(error)) = timeout(LOG_LIMIT, last).await {
            trouble.cause += &format!("; its last words: {error}");
        }
        trouble
    }
}

/// The last error of a log in JSON or text; without one, its last line.
fn last_error(lines: &[String]) -> Option<String> {
    let read = |line: &String| {
        let event: serde_json::Value = serde_json::from_str(line).ok()?;
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        (text("level") == "ERROR").then(|| match text("error").as_str() {
            "" => text("message"),
            error => format!("{}: {error}", text("message")),
        })
    };
    let is_text = |line: &&String| line.contains("ERROR") || line.starts_with("kiam-agent:");
    let error = lines.iter().rev().find_map(read);
    let error = error.or_else(|| lines.iter().rev().find(is_text).cloned());
    error.or_else(|| lines.iter().rev().find(|line| !line.trim().is_empty()).cloned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_found_in_json_and_in_text() {
        let lines =
            |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let json = lines(&[
            r#"{"level":"ERROR","message":"Older"}"#,
            r#"{"level":"ERROR","message":"The agent can't start","error":"no bpffs"}"#,
            r#"{"level":"INFO","message":"Bye"}"#,
        ]);
        assert_eq!(last_error(&json).unwrap(), "The agent can't start: no bpffs");
        let text = lines(&["2026 ERROR bad", "more"]);
        assert_eq!(last_error(&text).unwrap(), "2026 ERROR bad");
        assert_eq!(last_error(&lines(&["panicked", ""])).unwrap(), "panicked");
        assert_eq!(last_error(&[]), None);
    }
}
