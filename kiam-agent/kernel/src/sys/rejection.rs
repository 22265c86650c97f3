//! The error message for a program that the kernel rejects.

use std::{fs, io};

use aya::programs::ProgramError;
use tracing::debug;

use super::features;
use crate::error::Error;
use kiam_common::names::program;

/// The number of lines of the verifier's log in an error. The last lines have the reason, and a whole log has thousands.
const LINES: usize = 20;

/// The kernel rejected a program.
#[derive(Debug, thiserror::Error)]
#[error("kernel {release} rejects program {name}: {source}; {remedy}{tail}")]
pub struct ProgramRejection {
    /// The kernel's release.
    release: String,
    /// The program's name.
    name: &'static str,
    /// What to do.
    remedy: String,
    /// The end of the verifier's log, after a heading; empty without a log.
    tail: String,
    /// The kernel's error.
    #[source]
    source: io::Error,
}

/// Makes an error for program `name`. The verifier's whole log is logged at debug level.
pub(crate) fn program_error(name: &'static str) -> impl Fn(ProgramError) -> Error + Copy {
    move |source| match source {
        ProgramError::LoadError { io_error, verifier_log } => Error::Refused(Box::new(
            ProgramRejection::new(name, io_error, &verifier_log.to_string()),
        )),
        source => Error::Program { name, source },
    }
}

impl ProgramRejection {
    pub(super) fn new(name: &'static str, source: io::Error, log: &str) -> Self {
        debug!(program = name, %log, "The kernel rejected a program");
        let (release, remedy) = (kernel_release(), remedy(name, &source, log.trim().is_empty()));
        Self { release, name, remedy, tail: tail(log), source }
    }
}

/// The kernel's release, as in `uname -r`.
pub(crate) fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// The remedy for the error. An empty verifier's log means that the kernel does not know the program's type.
fn remedy(name: &str, error: &io::Error, unknown: bool) -> String {
    let errno = error.raw_os_error();
    if unknown
        && errno == Some(libc::EINVAL)
        && let Some(feature) = features::of_program(name)
    {
        return feature.needed();
    }
    let known = match (name, errno) {
        (_, Some(libc::EPERM)) => {
            "run the agent as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN and, before kernel 5.11, an unlimited RLIMIT_MEMLOCK"
        }
        (program::UPLINK, _) => {
            "leave uplink out of --guard, and report the log: docs/kernels.md lists the kernels that load the program"
        }
        _ => {
            "run a kernel that docs/kernels.md lists, or the agent's previous release, and report the log"
        }
    };
    known.to_owned()
}

/// The last lines; the whole log is logged at debug level.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let shown = &lines[lines.len().saturating_sub(LINES)..];
    if shown.is_empty() {
        return String::new();
    }
    let all = if shown.len() < lines.len() { " (--level=debug shows all of it)" } else { "" };
    format!("\nThe end of the verifier's log{all}:\n{}", shown.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::telemetry::captured::CapturedLogs;

    fn refused(name: &'static str, errno: i32, log: &str) -> String {
        let refusal = ProgramRejection::new(name, io::Error::from_raw_os_error(errno), log);
        Error::from(Box::new(refusal)).to_string()
    }

    #[test]
    fn a_refusal_names_kernel_program_and_remedy_and_shows_the_end_of_the_log() {
        let long: Vec<String> = (0..5000).map(|number| format!("{number}: (bf) r1 = r6")).collect();
        let logged = CapturedLogs::start(tracing::Level::DEBUG);
        let text = refused(program::UPLINK, libc::EACCES, &long.join("\n"));
        assert_eq!(logged.lines_with("17: (bf)").len(), 50, "the rest is logged");
        let first = text.lines().next().unwrap();
        let release = kernel_release();
        assert!(
            first.contains(&format!("kernel {release} rejects program kiam_uplink")),
            "{first}"
        );
        assert!(first.contains("leave uplink out of --guard"), "{first}");
        assert_eq!(text.lines().count(), 2 + LINES, "{text}");
        assert!(text.ends_with("4999: (bf) r1 = r6") && !text.contains("4979:"), "{text}");
    }

    #[test]
    fn a_refusal_without_a_log_is_one_line() {
        let text = refused(program::CONNECT4, libc::EPERM, "\n");
        assert!(text.contains("CAP_BPF") && !text.contains('\n'), "{text}");
    }
}
