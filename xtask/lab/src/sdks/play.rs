//! One client in the pods of one stage: what it did there, and what of that falls short.

use std::fmt;
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::fake::aws::{BUCKET, Signed};
use lab::fake::imds::REGION;
use lab::{LabPod, role_arn};
use tokio::time::Instant;

use super::home::Homes;
use super::rows::{Ends, Region, Row, Tokens};
use super::stage::{Combination, ROLE, Stage};

const STEP: Duration = Duration::from_millis(5);
/// After which a client is taken to hang.
const LIMIT: Duration = Duration::from_secs(90);
/// How long a client may try where there are no credentials to have.
const PATIENCE: Duration = Duration::from_secs(20);

/// How one run of a client went.
#[derive(Debug)]
struct Run {
    /// From its start to its first signed request.
    first: Option<Duration>,
    /// From its start until it ended or said that it found nothing; absent: it was ended.
    gave_up: Option<Duration>,
    signed: Vec<Signed>,
    printed: String,
}

/// What a client did on a stage.
#[derive(Debug)]
pub(super) struct Played {
    pub(super) client: &'static str,
    pub(super) combination: Combination,
    /// Until its first signed request in the pod with a role; absent where it asks without the tokens that are required.
    pub(super) first: Option<Duration>,
    /// Until it gave up in the pod whose role AWS denies.
    pub(super) denied: Option<Duration>,
    /// Until it gave up in the pod without a role.
    pub(super) without: Option<Duration>,
    faults: Vec<String>,
}

impl fmt::Display for Played {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, denied, without] = [self.first, self.denied, self.without].map(seconds);
        let verdict = if self.faults.is_empty() { "ok" } else { "FELL SHORT" };
        write!(
            f,
            "{}, {}: first {first}, denied {denied}, without a role {without}: {verdict}",
            self.client, self.combination
        )
    }
}

/// As a phrase.
pub(super) fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(|| "–".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()))
}

impl Played {
    /// What fell short, a line each.
    pub(super) fn faults(&self) -> impl Iterator<Item = String> {
        let place = format!("{}, {}", self.client, self.combination);
        self.faults.iter().map(move |fault| format!("{place}: {fault}"))
    }
}

impl Stage {
    /// Runs the client in each pod. Fails only when it can't be started.
    pub(super) fn play(&self, row: &Row, homes: &Homes) -> Result<Played> {
        let with = |region| self.run(row, homes, &self.reader, region);
        let mut faults = Vec::new();
        let refused = row.tokens == Tokens::Never && self.combination.imdsv2 == "required";
        let reader = with(true)?;
        if refused {
            faults.extend(reader.nobody(row, "it asks without tokens, which are required"));
        } else {
            faults.extend(self.somebody(&reader));
            if row.region == Region::Finds {
                let found = with(false)?;
                let fault = self.somebody(&found).or_else(|| elsewhere(&found));
                faults.extend(fault.map(|fault| format!("without AWS_REGION: {fault}")));
            }
        }
        let (denied, without) = thread::scope(|scope| {
            let denied = scope.spawn(|| self.run(row, homes, &self.denied, true));
            let without = self.run(row, homes, &self.without, true);
            (denied.join(), without)
        });
        let denied = denied.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let without = without?;
        faults.extend(denied.nobody(row, "AWS denies the role"));
        faults.extend(without.nobody(row, "the pod has no role"));
        if !faults.is_empty() {
            let last: Vec<_> = self.log().lines().rev().take(5).map(str::to_owned).collect();
            faults.push(format!("the agent's last words: {last:#?}"));
        }
        Ok(Played {
            client: row.name,
            combination: self.combination,
            first: reader.first,
            denied: denied.gave_up,
            without: without.gave_up,
            faults,
        })
    }

    /// That it was its pod's role, whole: by key, secret and token.
    fn somebody(&self, run: &Run) -> Option<String> {
        if run.first.is_none() {
            return Some(format!("it has no credentials and must be {ROLE}: {}", run.last()));
        }
        run.signed.iter().find_map(|signed| {
            let owner = self.lab.sts.owner(&signed.access_key).map(|issued| issued.role);
            if owner.as_deref() != Some(&role_arn(ROLE)) {
                return Some(format!("it is {owner:?} ({}) and must be {ROLE}", signed.access_key));
            }
            signed.fault.clone()
        })
    }

    fn run(&self, row: &Row, homes: &Homes, pod: &LabPod, region: bool) -> Result<Run> {
        let before = self.aws.signed().len();
        let log = self.lab.node.folder().join(format!("{}.txt", pod.spec().name));
        let printed = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let endpoint = format!("http://{}", self.aws.address());
        let mut command = homes.command(row, pod, &endpoint)?;
        command.env("ENDPOINT", &endpoint).env("AWS_ENDPOINT_URL", &endpoint).env("BUCKET", BUCKET);
        if region {
            command.env("AWS_REGION", REGION).env("AWS_DEFAULT_REGION", REGION);
        }
        command.stdin(Stdio::null()).stdout(printed.try_clone().context("sharing its output")?);
        let started = Instant::now();
        let child = command.stderr(printed).spawn();
        let child = child.with_context(|| format!("starting {}", row.name))?;
        let (mut child, pod) = (Running(child, log), pod.ips());
        let signed = || self.signed(before, pod);
        let gave_up = child.wait(row.ends, || !signed().is_empty())?;
        let signed = signed();
        let first = signed.first().map(|first| first.at.duration_since(started));
        Ok(Run { first, gave_up, signed, printed: child.printed() })
    }

    fn signed(&self, before: usize, pod: [IpAddr; 2]) -> Vec<Signed> {
        let signed = self.aws.signed().into_iter().skip(before);
        signed.filter(|signed| pod.contains(&signed.from)).collect()
    }
}

impl Run {
    /// That it found nothing, was soon done with it, and said so as the documents have it.
    fn nobody(&self, row: &Row, why: &str) -> Option<String> {
        if let Some(signed) = self.signed.first() {
            return Some(format!("{why}, and it signs as {}", signed.access_key));
        }
        match self.gave_up {
            Some(after) if after > PATIENCE => {
                Some(format!("{why}, and it tries for {after:?}: {}", self.last()))
            }
            Some(_) if !self.printed.contains(row.says) => {
                Some(format!("{why}, and it does not say {:?}: {}", row.says, self.last()))
            }
            Some(_) => None,
            None => Some(format!("{why}, and it hangs for {LIMIT:?}: {}", self.last())),
        }
    }

    /// The end of what it printed.
    fn last(&self) -> &str {
        let start = self.printed.char_indices().rev().nth(600).map_or(0, |(at, _)| at);
        &self.printed[start..]
    }
}

/// That the region it found is the node's.
fn elsewhere(run: &Run) -> Option<String> {
    let region = run.signed.first()?.region.as_deref();
    (region != Some(REGION)).then(|| format!("it signs for region {region:?}"))
}

/// A client, with the file that has what it printed. Drop ends it.
struct Running(Child, PathBuf);

// === impl Running ===

impl Running {
    /// Waits until it ends, has `done` what it is for where it goes on, or says that it gives up.
    fn wait(&mut self, ends: Ends, done: impl Fn() -> bool) -> Result<Option<Duration>> {
        let started = Instant::now();
        while started.elapsed() < LIMIT {
            if self.0.try_wait().context("asking after a client")?.is_some() {
                return Ok(Some(started.elapsed()));
            }
            if !matches!(ends, Ends::Yes) && done() {
                return Ok(None);
            }
            if let Ends::Never { gives_up } = ends
                && self.printed().contains(gives_up)
            {
                return Ok(Some(started.elapsed()));
            }
            thread::sleep(STEP);
        }
        Ok(None)
    }

    fn printed(&self) -> String {
        let printed = fs::read(&self.1).unwrap_or_default();
        String::from_utf8_lossy(&printed).trim().to_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
