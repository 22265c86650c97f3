//! The agent is replaced, killed and started again, while pods ask.

use std::time::Duration;

use anyhow::Result;

use super::{
    script::{CAST, Script, label},
    transcript::{millis, show},
};
use crate::{
    Agent, READY_LIMIT,
    pod_client::{Attempt, Options},
    role_arn, tells_namespaces_apart,
};

/// Between two attempts: a pod's share of requests is not to be what the demo shows.
const PAUSE_MS: u64 = 20;

impl Script {
    pub(super) fn agent_is_replaced(&mut self) -> Result<()> {
        self.transcript.section("A newer agent takes over, while a pod keeps asking");
        let before = self.packets();
        let asking = Options { pause_ms: PAUSE_MS, ..Options::default() };
        let asked = self.pods[0].ask_meanwhile(&asking)?;
        let mut next = Agent::start(&self.lab, &self.binary, &[])?;
        next.wait_said("Listening", READY_LIMIT)?;
        if let Some(mut old) = self.agent.replace(next) {
            old.terminate()?;
        }
        let attempts = asked.finish()?;
        let role = CAST[0].2.map(role_arn);
        let own = attempts.iter().filter(|attempt| self.lab.role_of(attempt) == role).count();
        let leaked = self.packets() - before;
        self.transcript.claim(
            format!("{} asked {} times, answered {own}", label(&self.pods[0]), attempts.len()),
            &[
                ("each time with its own role's credentials", own == attempts.len()),
                ("no packet of a pod reached the real IMDS", leaked == 0),
            ],
        );
        Ok(())
    }

    pub(super) fn agent_dies(&mut self) -> Result<()> {
        self.transcript
            .section("kill -9: nobody answers, and nobody falls through to the node's credentials");
        let before = self.packets();
        if let Some(agent) = &mut self.agent {
            agent.kill()?;
        }
        // By the node's path connects go to the dead agent's port until its lease runs out.
        let refusals: &[&str] =
            if tells_namespaces_apart()? { &["EPERM"] } else { &["ECONNREFUSED", "EPERM"] };
        let mut last = String::new();
        for pod in &self.pods {
            let attempt = pod.credentials()?;
            let took = millis(Duration::from_micros(attempt.micros));
            let got = show(&attempt);
            // The first one may meet a listener that closes after its process: that connection is cut.
            self.transcript.claim(
                format!("{:<16}{got:<14}after {took}", label(pod)),
                &[("nobody answers", attempt.error.is_some())],
            );
            last = got;
        }
        let leaked = self.packets() - before;
        self.transcript.claim(
            format!("packets from these pods at the real IMDS meanwhile: {leaked}"),
            &[
                ("none got there", leaked == 0),
                ("the kernel refuses", refusals.contains(&last.as_str())),
            ],
        );
        Ok(())
    }

    pub(super) fn agent_returns(&mut self) -> Result<()> {
        self.transcript.section("The agent returns, while a pod keeps asking");
        let before = self.packets();
        let asking = Options { pause_ms: PAUSE_MS, ..Options::default() };
        let asked = self.pods[0].ask_meanwhile(&asking)?;
        let mut agent = Agent::start(&self.lab, &self.binary, &[])?;
        let took = agent.wait_ready(READY_LIMIT)?;
        self.agent = Some(agent);
        self.transcript.say(format!("ready again after {}", millis(took)));
        self.ask_all()?;
        let attempts = asked.finish()?;
        let role = CAST[0].2.map(role_arn);
        let (given, cut): (Vec<_>, Vec<_>) =
            attempts.iter().partition(|attempt| attempt.status == Some(200));
        let own = |attempt: &&Attempt| self.lab.role_of(attempt) == role;
        let leaked = self.packets() - before;
        self.transcript.claim(
            format!(
                "{} asked {} times: {} refused or cut, {} answered",
                label(&self.pods[0]),
                attempts.len(),
                cut.len(),
                given.len()
            ),
            &[
                (
                    "it was answered in the end",
                    attempts.last().is_some_and(|attempt| attempt.status == Some(200)),
                ),
                ("every answer was of its own role", given.iter().all(own)),
                (
                    "what was not answered was cut or refused",
                    cut.iter().all(|attempt| attempt.error.is_some()),
                ),
                ("no packet of a pod reached the real IMDS", leaked == 0),
            ],
        );
        Ok(())
    }
}
