//! Reads what `/proc` says about the processes that got credentials, and makes the lines.

use std::time::Duration;

use tracing::warn;

use super::{
    hand_out::{HandOut, escaped},
    line::line,
    metrics::Metrics,
    shares::Entry,
    unusual::{KnownContainers, Reason, is_of_shell},
};
use kiam_core::{
    blocking::Blocking,
    pods::{Opener, PodReader, PodUid},
    telemetry::LogLimit,
};
use kiam_kernel::identity::ProcessReader;

/// The shortest time between two log lines about one pod and reason.
const LOG_PERIOD: Duration = Duration::from_secs(60);
/// The most characters of a program's name in the log.
const MAX_SHOWN: usize = 64;

pub(super) struct Inspector {
    pub(super) metrics: Metrics,
    processes: ProcessReader,
    containers: KnownContainers,
    pods: PodReader,
    log: LogLimit<(PodUid, Reason)>,
}

// === impl Inspector ===

impl Inspector {
    pub(super) fn new(pods: PodReader, settled: Duration, metrics: Metrics) -> Self {
        let processes = ProcessReader::new();
        if !processes.sees_all() {
            warn!(
                "The agent does not see the node's processes by the kernel's numbers (hostPID), so that the audit's lines name no executables"
            );
        }
        let containers = KnownContainers::new(settled);
        Self { metrics, processes, containers, pods, log: LogLimit::new(LOG_PERIOD) }
    }

    /// Reads what is known of the process that opened a connection, once.
    pub(super) fn inspect(&self, blocking: &Blocking, opener: &Opener) {
        if let Some(process) = &opener.process {
            opener.inspection.get_or_init(|| self.processes.inspect(blocking, process));
        }
    }

    /// The line of `entry`. Its process is read now if it was not when it connected.
    pub(super) fn line(&mut self, blocking: &Blocking, entry: &Entry) -> Vec<u8> {
        let hand_out = &entry.hand_out;
        if let Some(opener) = &hand_out.opener {
            self.inspect(blocking, opener);
        }
        if hand_out.unusual.get().is_none() {
            let reasons = self.unusual(blocking, hand_out);
            for reason in &reasons {
                self.metrics.unusual(*reason);
                self.report(hand_out, *reason);
            }
            let _ = hand_out.unusual.set(reasons);
        }
        line(entry)
    }

    fn unusual(&mut self, blocking: &Blocking, hand_out: &HandOut) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let Some(process) = hand_out.process() else { return reasons };
        let inspection = hand_out.inspection();
        if is_of_shell(process.comm.as_bytes(), inspection) {
            reasons.push(Reason::Shell);
        }
        let container = hand_out.opener.as_ref().and_then(|opener| opener.container.as_ref());
        if let Some(container) = container
            && self.containers.is_new(&hand_out.pod.uid, container, &self.pods)
            && self.containers.is_late(self.processes.container_age(blocking, process))
        {
            reasons.push(Reason::Container);
        }
        reasons
    }

    fn report(&self, hand_out: &HandOut, reason: Reason) {
        let HandOut { pod, opener, .. } = hand_out;
        let Some(left_out) = self.log.admit((pod.uid.clone(), reason)) else { return };
        let process = hand_out.process();
        let inspection = hand_out.inspection();
        let parent = inspection.and_then(|it| it.parent.as_ref());
        warn!(
            pod.namespace = pod.namespace,
            pod.name = pod.name,
            pod.container = opener.as_ref().and_then(|it| it.container.as_ref()).map(AsRef::as_ref),
            process.pid = process.map(|process| process.pid),
            process.comm = process.map(|process| process.comm.to_string()),
            parent.comm = parent.map(|parent| escaped(&parent.comm, MAX_SHOWN)),
            credentials.access.key = &*hand_out.access_key_id,
            ?reason,
            left_out,
            "Unusual process got credentials"
        );
    }
}
