//! A pod that asks again and again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    PodSpec,
    runtime::{Container, Sandbox, Shape},
};

use super::stage::{NAMESPACE, Stage, wait};

/// The role that it has.
const ROLE: &str = "orders";
/// Asks on a new connection each 50 ms, and says when and what came of it, a line each.
const SCRIPT: &str = "
while :; do
    answer=$(/bin/busybox wget -T 10 -qO- http://169.254.169.254/latest/meta-data/iam/security-credentials/orders 2>&1)
    code=$?
    read -r uptime idle </proc/uptime
    echo $uptime $code $answer
    /bin/busybox sleep 0.05
done";

/// The pod.
pub(super) struct AskingPod {
    spec: PodSpec,
    sandbox: Sandbox,
    container: Container,
}

/// What came of its asking.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// How often it got its own credentials.
    pub(super) served: usize,
    /// What it said when it did not.
    pub(super) failures: Vec<String>,
    /// From the last answer before a failure to the next answer, at most.
    pub(super) longest: Duration,
}

// === impl AskingPod ===

impl AskingPod {
    /// Starts it, and waits for its first answer.
    pub(super) fn start(stage: &Stage) -> Result<Self> {
        let kubelet = stage.kubelet()?;
        let spec = PodSpec::new(NAMESPACE, &stage.name("client")).role(ROLE);
        let (spec, sandbox) = stage.sandbox(&kubelet, spec, Shape::default())?;
        let container = kubelet.start(&sandbox, ("main", 0), &["/bin/sh", "-c", SCRIPT])?;
        stage.publish(&kubelet, &spec, &sandbox)?;
        let client = Self { spec, sandbox, container };
        client.wait_served(stage, 1)?;
        Ok(client)
    }

    /// What came of it until now.
    pub(super) fn tally(&self, stage: &Stage) -> Result<Tally> {
        let output = stage.kubelet()?.output(&self.container)?;
        let whole = output.rfind('\n').map_or("", |end| output.split_at(end).0);
        let (mut tally, mut last, mut failed) = (Tally::default(), Duration::ZERO, false);
        for line in whole.lines() {
            let mut fields = line.splitn(3, ' ');
            let now = fields.next().and_then(|uptime| uptime.parse().ok());
            let now = now.with_context(|| format!("no line of the client's: {line:?}"))?;
            let now = Duration::from_secs_f64(now);
            let (code, answer) = (fields.next(), fields.next().unwrap_or_default());
            if code == Some("0") {
                stage.ensure_role(answer, ROLE)?;
                if failed {
                    tally.longest = tally.longest.max(now - last);
                }
                (last, failed) = (now, false);
                tally.served += 1;
            } else {
                failed = true;
                tally.failures.push(line.to_owned());
            }
        }
        Ok(tally)
    }

    /// Waits until it was served so often.
    pub(super) fn wait_served(&self, stage: &Stage, often: usize) -> Result<()> {
        wait("the client", || match self.tally(stage) {
            Ok(tally) if tally.served >= often => None,
            Ok(tally) => Some(format!("{tally:?}")),
            Err(error) => Some(format!("{error:#}")),
        })
    }

    /// Waits until it was served ten times more.
    pub(super) fn go_on(&self, stage: &Stage) -> Result<()> {
        self.wait_served(stage, self.tally(stage)?.served + 10)
    }

    /// Ends it.
    pub(super) fn finish(self, stage: &Stage) -> Result<Tally> {
        let tally = self.tally(stage)?;
        stage.delete(&stage.kubelet()?, &self.spec, self.sandbox)?;
        Ok(tally)
    }

    /// Ends it, and fails unless it was served each time; how often.
    pub(super) fn finish_served(self, stage: &Stage) -> Result<usize> {
        let tally = self.finish(stage)?;
        ensure!(tally.failures.is_empty(), "{tally:?}");
        Ok(tally.served)
    }
}
