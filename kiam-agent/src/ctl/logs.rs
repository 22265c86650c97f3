//! `kubectl kiam logs`: the log of a node's agent, or its lines about one pod.

use std::{str::FromStr, time::Duration};

use futures::StreamExt as _;
use serde_json::Value;

use super::{
    explain::{Unplaced, find},
    fleet::{Fleet, Place},
    output::say,
};
use crate::{
    cluster::{LogPart, OperatorClient},
    printable::printable,
};
use kiam_core::names::PodName;

/// Whose lines are printed.
enum Subject {
    /// All of an agent.
    Node(String),
    /// Those that name a pod.
    Pod(PodName),
}

/// What to print.
pub(super) struct Options {
    pub(super) of: String,
    pub(super) follow: bool,
    pub(super) previous: bool,
    pub(super) tail: u32,
    pub(super) since: Option<Duration>,
}

/// Prints the log until its end, or with `follow` until the agent's.
pub(super) async fn logs(
    client: &OperatorClient,
    place: &Place,
    options: Options,
) -> Result<(), String> {
    let subject = Subject::parse(&options.of)?;
    let agent = match &subject {
        Subject::Pod(pod) => {
            let found = find(client, place, pod).await.map_err(|failure| failure.to_string())?;
            found.map_err(|Unplaced { cause, remedy, .. }| format!("{cause}; {remedy}"))?.agent
        }
        Subject::Node(node) => {
            let found = Fleet::agent_of(client, place, node).await;
            let found = found.map_err(|failure| failure.to_string())?;
            found.map_err(|trouble| format!("{}; {}", trouble.cause, trouble.remedy))?
        }
    };
    let part = LogPart {
        follow: options.follow,
        previous: options.previous,
        tail: Some(options.tail.into()),
        since_seconds: options.since.map(|it| it.as_secs().max(1).try_into().unwrap_or(i64::MAX)),
    };
    let lines = client.log(&agent.at, part).await.map_err(|failure| failure.to_string())?;
    let mut lines = std::pin::pin!(lines);
    while let Some(line) = lines.next().await {
        let line = line.map_err(|error| error.to_string())?;
        if subject.has(&line) && !say(&(printable(&line) + "\n")) {
            break;
        }
    }
    Ok(())
}

// === impl Subject ===

impl Subject {
    fn parse(text: &str) -> Result<Self, String> {
        match text.contains('/') {
            true => PodName::from_str(text).map(Self::Pod),
            false => Ok(Self::Node(text.to_owned())),
        }
    }

    /// Whether a line of the log is about it. Lines in JSON have the pod's name and namespace as fields. In text both are quoted,
    /// and quotes in what others wrote are escaped.
    fn has(&self, line: &str) -> bool {
        let Self::Pod(pod) = self else { return true };
        match serde_json::from_str::<Value>(line) {
            Ok(event) => {
                let of_audit = &event["pod"];
                let own =
                    event["pod.name"] == pod.name() && event["pod.namespace"] == pod.namespace();
                let audited =
                    of_audit["name"] == pod.name() && of_audit["namespace"] == pod.namespace();
                own || audited || event["pod"] == pod.to_string()
            }
            Err(_) => {
                let field = |name: &str, value: &str| {
                    let field = format!("{name}=\"{value}\"");
                    line.split_whitespace().any(|word| word == field)
                };
                field("pod.name", pod.name()) && field("pod.namespace", pod.namespace())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_name_the_pod_in_fields_are_its_own() {
        let subject = Subject::parse("shop/orders").unwrap();
        for (line, own) in [
            (r#"{"message":"a","pod.name":"orders","pod.namespace":"shop"}"#, true),
            (r#"{"message":"a","pod.name":"orders","pod.namespace":"other"}"#, false),
            (r#"{"message":"pod.name=orders pod.namespace=shop"}"#, false),
            (r#"INFO Issued pod.name="orders" pod.namespace="shop""#, true),
            (r#"INFO Issued pod.name="orders-1" pod.namespace="shop""#, false),
            // A line of the audit.
            (r#"{"audit":"credentials","pod":{"namespace":"shop","name":"orders"}}"#, true),
            (r#"{"audit":"credentials","pod":{"namespace":"other","name":"orders"}}"#, false),
            // Another pod's, by what it calls itself.
            (r#"INFO a pod.name="x" user_agent="a pod.name=orders pod.namespace=shop a""#, false),
            (
                r#"INFO a pod.name="x" user_agent="a pod.name=\"orders\" pod.namespace=\"shop\" a""#,
                false,
            ),
        ] {
            assert_eq!(subject.has(line), own, "{line}");
        }
        assert!(Subject::parse("n1").unwrap().has("anything"));
        assert!(Subject::parse("a/b/c").is_err());
    }
}
