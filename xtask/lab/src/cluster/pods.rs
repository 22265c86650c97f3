//! What pods that ask have said in their logs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::role_arn;
use serde_json::Value;

use super::stage::{Stage, wait};
use crate::node_vm::Owner;

/// The namespace of pods that may have roles.
pub(super) const NAMESPACE: &str = "shop";

/// What came of one try.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Try {
    /// The node's uptime, from a pod that says it.
    pub(super) at: Duration,
    /// The credentials, or why there were none.
    pub(super) answer: Result<String, String>,
}

/// What came of all tries of a client.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) served: usize,
    pub(super) failed: Vec<String>,
    /// From the last answer before a failure to the next answer, at most.
    pub(super) longest: Duration,
}

// === impl Try ===

impl Try {
    /// From a line of `xtask/cluster/ask`.
    fn read(line: &str) -> Option<Self> {
        let (at, rest) = line.split_once(' ')?;
        let at = Duration::try_from_secs_f64(at.parse().ok()?).ok()?;
        let answer = match rest.split_once(' ') {
            Some(("yes", answer)) => Ok(answer.to_owned()),
            Some(("no", said)) => Err(said.to_owned()),
            _ => return None,
        };
        Some(Self { at, answer })
    }
}

/// The tries in a log; the last line is left out while it is not whole.
fn tries(log: &str) -> Vec<Try> {
    let whole = log.rfind('\n').map_or("", |end| log.split_at(end).0);
    whole.lines().filter_map(Try::read).collect()
}

impl Stage {
    /// The pods with this label `kind`, and not on their way out.
    pub(super) fn pods(&self, kind: &str) -> Result<Vec<Value>> {
        let list =
            self.kubectl.get(&format!("pods --namespace={NAMESPACE} --selector=kind={kind}"))?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        Ok(pods.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect())
    }

    /// The one pod with this label; its name.
    pub(super) fn pod(&self, kind: &str) -> Result<String> {
        let pods = self.pods(kind)?;
        let [pod] = pods.as_slice() else {
            anyhow::bail!("{} pods are {kind}", pods.len());
        };
        Ok(pod["metadata"]["name"].as_str().context("a pod has a name")?.to_owned())
    }

    /// What a container has tried.
    pub(super) fn tries(&self, pod: &str, container: &str) -> Result<Vec<Try>> {
        self.tries_of(&format!("{pod} --container={container}"))
    }

    /// The same, of the life before.
    pub(super) fn former_tries(&self, pod: &str, container: &str) -> Result<Vec<Try>> {
        self.tries_of(&format!("{pod} --container={container} --previous"))
    }

    fn tries_of(&self, words: &str) -> Result<Vec<Try>> {
        Ok(tries(&self.kubectl.run(&format!("logs --namespace={NAMESPACE} {words}"))?))
    }

    /// Whose credentials these are.
    pub(super) fn owner(&self, answer: &str) -> Result<Owner> {
        Owner::of(answer, &self.sts)
    }

    /// Waits for a container's first try, which must have the credentials of `role`.
    pub(super) fn ensure_first(&self, kind: &str, container: &str, role: &Owner) -> Result<()> {
        let first = || {
            let pod = self.pod(kind)?;
            self.tries(&pod, container)?.into_iter().next().context("it has not asked")
        };
        wait(container, || first().err().map(|error| format!("{error:#}")))?;
        self.ensure_owner(&first()?, role).with_context(|| container.to_owned())
    }

    /// Fails unless a try had the credentials of `role`.
    pub(super) fn ensure_owner(&self, asked: &Try, role: &Owner) -> Result<()> {
        let answer = asked.answer.as_deref();
        let answer = answer.map_err(|said| anyhow::anyhow!("it was refused: {said}"))?;
        let owner = self.owner(answer)?;
        ensure!(owner == *role, "it has the credentials of {owner:?}, not {role:?}");
        Ok(())
    }

    /// Starts the pod that asks every 50 ms, and waits for its first answers.
    pub(super) fn start_client(&self) -> Result<()> {
        // One that a failed row has left has asked before.
        self.kubectl
            .run(&format!("delete pod client --namespace={NAMESPACE} --ignore-not-found"))?;
        self.apply("client.yaml")?;
        self.wait_served(10)
    }

    /// Waits until the client was served so often.
    pub(super) fn wait_served(&self, often: usize) -> Result<()> {
        wait("the client", || match self.tally() {
            Ok(tally) if tally.served >= often => None,
            Ok(tally) => Some(format!("{tally:?}")),
            Err(error) => Some(format!("{error:#}")),
        })
    }

    /// Waits until it was served twenty times more, and ends it.
    pub(super) fn end_client(&self) -> Result<Tally> {
        self.wait_served(self.tally()?.served + 20)?;
        let tally = self.tally()?;
        self.kubectl.run(&format!("delete pod client --namespace={NAMESPACE}"))?;
        Ok(tally)
    }

    /// What came of its asking. Fails if it had others' credentials.
    pub(super) fn tally(&self) -> Result<Tally> {
        let own = own("client");
        let (mut tally, mut last, mut failing) = (Tally::default(), Duration::ZERO, false);
        for asked in self.tries("client", "main")? {
            if let Err(said) = &asked.answer {
                failing = true;
                tally.failed.push(said.clone());
                continue;
            }
            self.ensure_owner(&asked, &own)?;
            if failing {
                tally.longest = tally.longest.max(asked.at.saturating_sub(last));
            }
            (last, failing) = (asked.at, false);
            tally.served += 1;
        }
        Ok(tally)
    }
}

/// The role that a pod of this kind has.
pub(super) fn own(kind: &str) -> Owner {
    Owner::Role(role_arn(kind))
}

// === impl Tally ===

impl Tally {
    /// How many of how many failed, and for how long; fails if any did and none may.
    pub(super) fn said(&self, may_fail: bool) -> Result<String> {
        let (failed, all) = (self.failed.len(), self.served + self.failed.len());
        ensure!(may_fail || failed == 0, "{failed} of {all} requests failed: {:?}", self.failed);
        let gap = match failed {
            0 => String::new(),
            _ => format!(", {:.1} s without an answer", self.longest.as_secs_f64()),
        };
        Ok(format!("{failed} of {all} requests failed{gap}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_read_from_whole_lines() {
        let log = "12.50 no wget: refused\nnoise\n0 yes {\"a\": 1}\n13.1 yes {\"cut";
        let at = Duration::from_secs_f64;
        let wanted = [
            Try { at: at(12.5), answer: Err("wget: refused".into()) },
            Try { at: at(0.0), answer: Ok("{\"a\": 1}".into()) },
        ];
        assert_eq!(tries(log), wanted);
    }

    #[test]
    fn failures_are_said_or_are_an_error() {
        let failed = vec!["refused".to_owned()];
        let tally = Tally { served: 9, failed, longest: Duration::from_millis(1500) };
        assert_eq!(tally.said(true).unwrap(), "1 of 10 requests failed, 1.5 s without an answer");
        tally.said(false).unwrap_err();
    }
}
