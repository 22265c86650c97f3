//! The boot guard: a systemd unit that sets the route guard's rules before the kubelet starts, so that after a reboot no
//! pod gets the node's credentials before the agent runs. The agent adopts the rules.

mod files;
mod note;
mod text;

use std::path::{Path, PathBuf};

use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

pub(crate) use self::note::take_note;
pub use self::{files::BootGuardError, text::is_boot_note};
use super::{Metrics, SWEEP};
use kiam_core::{
    blocking,
    lifecycle::{Detail, Drain},
    telemetry::Chain,
};

/// A file of the boot guard, for machines whose files the agent can't write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootText {
    /// The systemd unit.
    Unit,
    /// The script that the unit runs.
    Script,
    /// A script for user data that installs both.
    UserData,
}

/// The task that keeps the boot guard's files in place.
pub struct BootGuard {
    folder: PathBuf,
    preference: u32,
    metrics: Metrics,
    detail: Detail,
    /// The error of the last attempt; empty after a success.
    problem: String,
}

// === impl BootText ===

impl BootText {
    /// The text, for rules of `preference`.
    #[must_use]
    pub fn text(self, preference: u32) -> String {
        match self {
            Self::Unit => text::UNIT_TEXT.to_owned(),
            Self::Script => text::script(preference),
            Self::UserData => text::user_data(preference),
        }
    }
}

// === impl BootGuard ===

impl BootGuard {
    /// A boot guard in `folder`, the node's folder of units, for rules of `preference`.
    #[must_use]
    pub fn new(folder: PathBuf, preference: u32, metrics: Metrics, detail: Detail) -> Self {
        Self { folder, preference, metrics, detail, problem: String::new() }
    }

    /// Writes the files, and restores them when somebody changes or removes them, until the drain begins. A failure is
    /// reported, and stops nothing else.
    pub async fn keep(mut self, mut drain: Drain) {
        let mut sweeps = interval(SWEEP);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.started() => return,
                () = async { sweeps.tick().await; self.install().await } => {}
            }
        }
    }

    async fn install(&mut self) {
        let (folder, preference) = (self.folder.clone(), self.preference);
        let installed = blocking::spawn(move |_| files::install(&folder, preference)).await;
        match installed.unwrap_or(Err(BootGuardError::Panicked)) {
            Ok(written) => {
                if !written.is_empty() {
                    info!(
                        files = ?written,
                        "The boot guard is installed: from the next boot on the node sets the route guard's rules before its kubelet starts"
                    );
                }
                self.problem.clear();
                self.metrics.set_boot(true);
                self.detail.set("installed");
            }
            Err(error) => {
                let problem = Chain(&error).to_string();
                self.metrics.set_boot(false);
                self.detail.set(format!("failed: {problem}"));
                if problem != self.problem {
                    warn!(
                        error = problem,
                        "The boot guard is not installed: after a reboot pods can have the node's credentials until the agent has started"
                    );
                    self.problem = problem;
                }
            }
        }
    }
}

/// Whether the boot guard's files may go to `folder`, as far as can be seen without writing.
///
/// # Errors
///
/// [`BootGuardError`].
pub(crate) fn check(folder: &Path) -> Result<(), BootGuardError> {
    files::check(folder)
}

/// Removes the boot guard's files from `folder`, and returns the removed files. Missing files are no error.
///
/// # Errors
///
/// [`BootGuardError`] for the first that can't be removed.
pub fn remove_boot_guard(folder: &Path) -> Result<Vec<String>, BootGuardError> {
    files::remove(folder)
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use kiam_core::{
        lifecycle::{Readiness, drain},
        telemetry::captured::CapturedLogs,
    };

    #[tokio::test]
    async fn a_failure_shows_and_is_told_once_and_keeps_the_agent_from_nothing() {
        let logged = CapturedLogs::start(tracing::Level::WARN);
        let (mut registry, readiness) = (Registry::default(), Readiness::default());
        let metrics = Metrics::register(&mut registry);
        let detail = readiness.detail("boot guard");
        let mut guard = BootGuard::new("/proc/nowhere".into(), 5, metrics, detail);
        guard.install().await;
        guard.install().await;
        assert_eq!(logged.lines_with("The boot guard is not installed").len(), 1);
        assert!(readiness.is_ready(), "readiness does not depend on it");
        let [(_, shown)] = readiness.details().try_into().unwrap();
        assert!(shown.starts_with("failed: --boot-guard \"/proc/nowhere\""), "{shown}");
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("kiam_guard_boot{state=\"failed\"} 1"), "{text}");
        assert!(text.contains("kiam_guard_boot{state=\"installed\"} 0"), "{text}");
        let (signal, ending) = drain();
        signal.start();
        guard.keep(ending).await;
    }
}
