//! Writes lines, on a thread that nothing waits for.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::Receiver,
    },
    time::Duration,
};

use tracing::warn;

use super::{
    file::RotatedFile,
    metrics::{Loss, Metrics},
    shares::Place,
};
use kiam_core::telemetry::LogLimit;

/// The shortest time between two log lines about failed writes.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// A line on its way.
pub(super) struct Line {
    pub(super) text: Vec<u8>,
    /// The number of hand-outs that it stands for.
    pub(super) count: u64,
    pub(super) _place: Place,
}

/// Where lines go.
pub(super) enum Output {
    /// A descriptor of the log's own, so that a slow reader holds up no lock that the log's writers wait for.
    Log(File),
    File(RotatedFile),
}

// === impl Output ===

impl Output {
    pub(super) fn log() -> io::Result<Self> {
        Ok(Self::Log(io::stderr().as_fd().try_clone_to_owned()?.into()))
    }

    pub(super) fn file(path: PathBuf, size: u64) -> Self {
        Self::File(RotatedFile::new(path, size))
    }

    /// Writes `lines` until no more can come. Those that can't be written are counted.
    pub(super) fn write_all(
        mut self,
        lines: &Receiver<Line>,
        pending: &AtomicUsize,
        metrics: &Metrics,
    ) {
        let log = LogLimit::new(LOG_PERIOD);
        let failed = |error: io::Error| {
            if let Some(left_out) = log.admit(()) {
                warn!(%error, left_out, "Writing the audit failed; its lines are lost");
            }
        };
        if let Self::File(file) = &mut self {
            file.shrink().unwrap_or_else(failed);
        }
        while let Ok(line) = lines.recv() {
            let written = match &mut self {
                Self::Log(log) => log.write_all(&line.text),
                Self::File(file) => file.write(&line.text),
            };
            match written {
                Ok(()) => metrics.written(),
                Err(error) => {
                    metrics.dropped(Loss::Write, line.count);
                    failed(error);
                }
            }
            pending.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
