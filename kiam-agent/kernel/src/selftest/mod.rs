//! The self-test: the agent tries what a pod may try, before it becomes ready and then every minute.
//!
//! A process in a throw-away cgroup and network namespace connects to the IMDS in every form, sends what must be
//! denied, and connects by way of a program that rewrites addresses behind the agent's. Its connections are seen
//! where pods' are identified, or at a listener in its own namespace, and what leaves the node from its addresses is
//! counted.

mod client;
mod metrics;
mod namespace_entry;
mod sandbox;
mod tap;
mod witness;

use std::{fmt, io, path::PathBuf, process::Command, sync::Arc, time::Duration};

use prometheus_client::{encoding::EncodeLabelValue, registry::Registry};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tracing::{error, info, warn};

pub use self::{client::client, sandbox::CGROUP_PREFIX, witness::Witness};
use self::{
    client::{Attempt, Outcome},
    metrics::Metrics,
    namespace_entry::NamespaceEntry,
    sandbox::Sandbox,
    tap::Tap,
    witness::TestClient,
};
use crate::{
    intercept::{self, Flows, InterceptionParts, ListenerPath, Marks, Rewriter, SandboxTable},
    sys::{Cgroup, Walk},
};
use kiam_core::{
    blocking::{self, Blocking},
    lifecycle::{Detail, Drain, Latch, Readiness},
};

/// The hidden subcommand that runs [`client`].
pub const SUBCOMMAND: &str = "selftest-client";
/// The pause before a self-test that failed for the first time is repeated: the node may only have been busy.
const SOON: Duration = Duration::from_millis(100);
/// The pause after further failures.
const RETRY: Duration = Duration::from_secs(1);
/// The longest search for leftover cgroups of killed agents' self-tests.
const SWEEP_TIME: Duration = Duration::from_secs(2);
/// How long successive self-tests fail until the agent is not ready.
const LASTING: Duration = Duration::from_secs(1);

/// The listener that the self-test connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListenerKind {
    Node,
    Pod,
}

/// A part of the self-test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelValue)]
pub enum Part {
    /// Connects by IPv4 come to the agent with the caller's identity.
    Ipv4,
    /// Connects to the v4-mapped address come to the agent, too.
    Mapped,
    /// Connects by IPv6 come to the agent, too.
    Ipv6,
    /// Datagrams are denied.
    Datagram,
    /// Packets of raw sockets do not leave the node.
    Raw,
    /// A program that rewrites addresses after the agent's gives no access.
    Ancestor,
    /// The self-test itself could run.
    Selftest,
}

/// A failed part, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    part: Part,
    reason: String,
}

/// The self-test of one agent.
pub struct Selftest {
    interval: Duration,
    /// Whether callers are identified by the kernel's records (`--identity=kernel`).
    attested: bool,
    /// Whether the route guard or the program at the pods' cgroup blocks packets that the connect hooks can't see.
    guarded: bool,
    path: ListenerPath,
    /// The pods' cgroup.
    cgroup: PathBuf,
    marks: Marks,
    flows: Flows,
    sandboxes: SandboxTable,
    /// The program that rewrites addresses after the agent's programs.
    rewriter: Rewriter,
    witness: Witness,
    sandbox: Option<Sandbox>,
}

/// The latch, detail and metrics by which operators see the self-test.
pub struct SelftestStatus {
    /// Set while the self-test passes.
    latch: Latch,
    /// The failed parts.
    detail: Detail,
    metrics: Metrics,
}

// === impl SelftestStatus ===

impl SelftestStatus {
    /// Not passed yet; shown by `readiness`, with the metrics in `registry`.
    #[must_use]
    pub fn new(registry: &mut Registry, readiness: &Readiness) -> Self {
        Self {
            latch: readiness.latch("self-test"),
            detail: readiness.detail("self-test"),
            metrics: Metrics::register(registry),
        }
    }

    /// Reports `failures`, which lasted `since` the first of them. Returns the pause before the next self-test.
    fn report(&self, failures: &[Failure], since: Duration) -> Duration {
        let list: Vec<String> = failures.iter().map(ToString::to_string).collect();
        let list = list.join("; ");
        if since < LASTING {
            warn!(failures = list, "The self-test failed; repeating it");
            self.detail.set(format!("failed, being repeated: {list}"));
            return SOON;
        }
        self.latch.clear();
        error!(failures = list, "The self-test fails: pods may not be intercepted correctly");
        self.detail.set(list);
        RETRY
    }
}

// === impl Part ===

impl Part {
    const ALL: [Self; 7] = [
        Self::Ipv4,
        Self::Mapped,
        Self::Ipv6,
        Self::Datagram,
        Self::Raw,
        Self::Ancestor,
        Self::Selftest,
    ];
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.part, self.reason)
    }
}

// === impl Selftest ===

impl Selftest {
    /// A self-test of the programs that are attached by `config`, whose connections `witness` sees.
    #[must_use]
    pub fn new(config: &intercept::Config, parts: &InterceptionParts, witness: Witness) -> Self {
        Self {
            interval: config.selftest_interval,
            attested: config.attested,
            guarded: parts.guards_packets || config.guard.route.is_some(),
            path: config.path,
            cgroup: parts.cgroup.path().to_owned(),
            marks: parts.marks.clone(),
            flows: parts.flows.clone(),
            sandboxes: parts.sandboxes.clone(),
            rewriter: parts.rewriter.clone(),
            witness,
            sandbox: None,
        }
    }

    /// Runs the self-test at each interval until the drain begins, once `begin` is notified. Another agent that accepts from
    /// the same queues would take its connections, and could not know them.
    pub async fn keep(mut self, status: SelftestStatus, begin: Arc<Notify>, mut drain: Drain) {
        tokio::select! {
            () = drain.started() => return,
            () = begin.notified() => {}
        }
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = None;
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => {}
            }
            let Some((same, failures)) = self.run().await else { return };
            self = same;
            status.metrics.count(&failures);
            if failures.is_empty() {
                if failing.take().is_some() {
                    info!("The self-test passes again");
                }
                status.latch.set();
                status.detail.set("passed");
                continue;
            }
            let since = *failing.get_or_insert_with(Instant::now);
            sleep(status.report(&failures, since.elapsed())).await;
            ticks.reset_immediately();
        }
    }

    /// Runs one self-test off the runtime's threads; `None` when it panicked.
    async fn run(mut self) -> Option<(Self, Vec<Failure>)> {
        let made = blocking::spawn(move |blocking| {
            let failures = self.check(blocking).unwrap_or_else(|error| {
                // The next run starts with a new sandbox.
                self.discard();
                vec![Failure { part: Part::Selftest, reason: error.to_string() }]
            });
            (self, failures)
        });
        made.await.ok()
    }

    fn check(&mut self, blocking: &Blocking) -> io::Result<Vec<Failure>> {
        let listeners: &[ListenerKind] = match self.path {
            ListenerPath::Node => &[ListenerKind::Node],
            ListenerPath::Auto => &[ListenerKind::Node, ListenerKind::Pod],
            ListenerPath::PodLocal => &[ListenerKind::Pod],
        };
        let mut failures = Vec::new();
        for listener in listeners {
            failures.extend(self.check_listener(blocking, *listener)?);
        }
        Ok(failures)
    }

    fn check_listener(
        &mut self,
        blocking: &Blocking,
        listener: ListenerKind,
    ) -> io::Result<Vec<Failure>> {
        // Reopened each time, since it may have been recreated.
        let cgroup = Cgroup::open(blocking, Some(&self.cgroup)).map_err(io::Error::other)?;
        let sandbox = match self.sandbox.take() {
            Some(sandbox) => sandbox,
            None => prepare(blocking, &cgroup)?,
        };
        let sandbox = self.sandbox.insert(sandbox);
        self.marks.intercept(sandbox.cgroup_id()).map_err(io::Error::other)?;
        let (pod, addresses) = (sandbox.cgroup_id(), sandbox.addresses());
        let client = TestClient { cgroup: pod, netns: sandbox.cookie(), addresses };
        self.witness.watch(Some(client));
        let tap = Tap::open()?;
        let rewriting = self.rewriter.attach(&cgroup).map_err(io::Error::other)?;
        let mut client = Command::new("/proc/self/exe");
        let mut run = || sandbox.run(client.arg(SUBCOMMAND).env_clear());
        let output = match (listener, sandbox.cookie()) {
            (ListenerKind::Pod, Some(netns)) => {
                let table = &self.sandboxes;
                let published = NamespaceEntry::open(sandbox.netns(), (netns, pod), table)?;
                published.seen_by(&self.witness, &self.flows, run)??
            }
            (ListenerKind::Pod, None) if self.path == ListenerPath::PodLocal => {
                return Err(io::Error::other("--path=pod-local needs kernel 5.14"));
            }
            // Without cookies there are no pod listeners.
            (ListenerKind::Pod, None) => return Ok(Vec::new()),
            (ListenerKind::Node, Some(netns)) => {
                let known = (netns, pod);
                let _published = NamespaceEntry::without_listener(known, &self.sandboxes)?;
                run()?
            }
            (ListenerKind::Node, None) => run()?,
        };
        drop(rewriting);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::other(format!(
                "the client ended with {}: {said}",
                output.status
            )));
        }
        let outcomes: Vec<Outcome> = serde_json::Deserializer::from_slice(&output.stdout)
            .into_iter()
            .collect::<Result<_, _>>()?;
        let left = tap.left(&addresses);
        let (id, cookie, attested) = (sandbox.cgroup_id(), sandbox.cookie(), self.attested);
        let is_identified = |port| match self.witness.arrived(port) {
            None => false,
            Some(None) => !attested,
            Some(Some(entry)) => {
                entry.cgroup == id && cookie.is_none_or(|cookie| entry.netns == cookie)
            }
        };
        Ok(judge(&outcomes, left, self.guarded, is_identified))
    }

    fn discard(&mut self) {
        self.witness.watch(None);
        if let Some(sandbox) = self.sandbox.take() {
            // After a failure, the next start of an agent removes the mark.
            let _ = self.marks.remove(sandbox.cgroup_id());
        }
    }
}

impl Drop for Selftest {
    fn drop(&mut self) {
        self.discard();
    }
}

/// Creates a sandbox for the client: below the agent's own cgroup if the agent runs in a pod, since the kubelet removes
/// unknown pods.
fn prepare(blocking: &Blocking, cgroup: &Cgroup) -> io::Result<Sandbox> {
    let parent = cgroup.own().unwrap_or(cgroup.path());
    sandbox::sweep(&mut Walk::new(blocking, SWEEP_TIME), parent);
    Sandbox::create(parent)
}

/// The failed parts. `left` packets have left the node; `is_identified` looks up a connection by its port.
fn judge(
    outcomes: &[Outcome],
    left: u32,
    guarded: bool,
    is_identified: impl Fn(u16) -> bool,
) -> Vec<Failure> {
    let mut failures = Vec::new();
    let mut fail = |part, reason: String| failures.push(Failure { part, reason });
    let of = |attempt| outcomes.iter().find(|outcome| outcome.attempt == attempt);
    let connects =
        [(Attempt::Ipv4, Part::Ipv4), (Attempt::Mapped, Part::Mapped), (Attempt::Ipv6, Part::Ipv6)];
    for (attempt, part) in connects {
        match of(attempt) {
            None => fail(part, "not tried".to_owned()),
            // The node has no IPv6 at all.
            Some(Outcome { errno: Some(libc::EAFNOSUPPORT), .. }) => {}
            Some(Outcome { errno: Some(errno), .. }) => {
                fail(
                    part,
                    format!(
                        "{}; a firewall of the node may drop what pods send to the agent",
                        io::Error::from_raw_os_error(*errno)
                    ),
                );
            }
            Some(outcome) if !is_identified(outcome.port) => {
                fail(part, "the connection arrived without the caller's identity".to_owned());
            }
            Some(_) => {}
        }
    }
    if of(Attempt::Datagram).is_none_or(|outcome| outcome.errno != Some(libc::EPERM)) {
        fail(Part::Datagram, "a datagram was not denied".to_owned());
    }
    if guarded {
        if of(Attempt::Rewritten).is_none_or(|outcome| outcome.errno.is_none()) {
            fail(
                Part::Ancestor,
                "a connect that another program rewrote has reached its destination".to_owned(),
            );
        }
        if left > 0 {
            fail(Part::Raw, format!("{left} packets to the IMDS have left the node"));
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(change: impl Fn(&mut Outcome)) -> Vec<Outcome> {
        let good = [
            (Attempt::Ipv4, 1, None),
            (Attempt::Mapped, 2, None),
            (Attempt::Ipv6, 3, None),
            (Attempt::Rewritten, 4, Some(libc::EHOSTUNREACH)),
            (Attempt::Datagram, 0, Some(libc::EPERM)),
            (Attempt::Raw, 0, None),
        ];
        let outcomes = good.into_iter().map(|(attempt, port, errno)| {
            let mut outcome = Outcome { attempt, port, errno };
            change(&mut outcome);
            outcome
        });
        outcomes.collect()
    }

    fn parts(outcomes: &[Outcome], left: u32, guarded: bool) -> Vec<Part> {
        let failures = judge(outcomes, left, guarded, |port| port != 0);
        failures.into_iter().map(|failure| failure.part).collect()
    }

    #[test]
    fn each_wrong_outcome_is_told_by_its_part() {
        assert_eq!(parts(&all(|_| {}), 0, true), []);
        let wrong = |attempt, port, errno| {
            all(move |outcome| {
                if outcome.attempt == attempt {
                    *outcome = Outcome { attempt, port, errno };
                }
            })
        };
        let cases = [
            (wrong(Attempt::Ipv4, 1, Some(libc::ETIMEDOUT)), Part::Ipv4),
            (wrong(Attempt::Mapped, 0, None), Part::Mapped),
            (wrong(Attempt::Ipv6, 3, Some(libc::EPERM)), Part::Ipv6),
            (wrong(Attempt::Datagram, 0, None), Part::Datagram),
            (wrong(Attempt::Rewritten, 4, None), Part::Ancestor),
        ];
        for (outcomes, part) in cases {
            assert_eq!(parts(&outcomes, 0, true), [part]);
        }
        assert_eq!(parts(&all(|_| {}), 1, true), [Part::Raw]);
        let none = [Part::Ipv4, Part::Mapped, Part::Ipv6, Part::Datagram, Part::Ancestor];
        assert_eq!(parts(&[], 0, true), none);
    }

    #[test]
    fn what_the_flags_leave_out_is_not_asked_for() {
        let open = all(|outcome| {
            if outcome.attempt == Attempt::Rewritten {
                outcome.errno = None;
            }
        });
        assert_eq!(parts(&open, 2, false), []);
        let without_v6 = all(|outcome| {
            if outcome.attempt == Attempt::Ipv6 {
                outcome.errno = Some(libc::EAFNOSUPPORT);
            }
        });
        assert_eq!(parts(&without_v6, 0, true), []);
    }
}
