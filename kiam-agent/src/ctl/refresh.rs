//! `kubectl kiam refresh`: has a pod's credentials renewed by its node's agent.

use serde::Serialize;

use super::{
    ask::Asker,
    explain::{Unplaced, find},
    fleet::Place,
    output::Report,
    table::{Cell, Screen, Tone},
    trouble::Trouble,
};
use crate::cluster::RequestFailure;
use kiam_core::names::PodName;

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct RefreshReport {
    pod: String,
    node: Option<String>,
    issued: bool,
    /// The agent's words, or why it was not asked.
    says: String,
    remedy: Option<String>,
}

/// Has the credentials of `pod` renewed.
pub(super) async fn refresh(
    asker: &Asker,
    place: &Place,
    pod: &PodName,
) -> Result<RefreshReport, RequestFailure> {
    let name = pod.to_string();
    let report = |node, issued, says, remedy| RefreshReport {
        pod: name.clone(),
        node,
        issued,
        says,
        remedy,
    };
    let placed = match find(&asker.client, place, pod).await? {
        Ok(placed) => placed,
        Err(Unplaced { node, cause, remedy, .. }) => {
            return Ok(report(node, false, cause, Some(remedy)));
        }
    };
    let node = Some(placed.node);
    Ok(match asker.ask(&placed.agent, &["refresh", &name]).await {
        Ok(output) => {
            let says = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            report(node, output.code == Some(0), says, None)
        }
        Err(Trouble { cause, remedy, .. }) => report(node, false, cause, Some(remedy)),
    })
}

impl Report for RefreshReport {
    fn text(&self, screen: Screen) -> String {
        let tone = if self.issued { Tone::Good } else { Tone::Bad };
        let mut text = String::new();
        let remedy = self.remedy.iter().map(|remedy| format!("do: {remedy}"));
        for line in self.says.lines().map(str::to_owned).chain(remedy) {
            for part in screen.wrapped(&Cell::plain(line).to_string(), 0) {
                text += &screen.painted(&part, tone);
                text.push('\n');
            }
        }
        text
    }

    fn is_good(&self) -> bool {
        self.issued
    }
}
