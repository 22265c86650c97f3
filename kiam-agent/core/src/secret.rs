//! Strings that can't be printed by accident, and memory that no crash writes to a disk.

use std::{fmt, io};

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use zeroize::Zeroizing;

/// A secret access key, session token or bearer token.
///
/// It implements neither `Display` nor `Serialize`, its `Debug` hides the text, and its memory is overwritten when it is
/// dropped. Code that needs the text calls [`Secret::expose`], so that a search for that word finds every place where a
/// secret can leave.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

/// Forbids core dumps of this process, in a file and by a collector that `core_pattern` pipes to (which `RLIMIT_CORE`
/// alone does not prevent). Only processes with `CAP_SYS_PTRACE` can trace it or read its memory. A process that it
/// executes is dumpable again, but may leave no file.
///
/// # Errors
///
/// The system's; a seccomp filter may deny either call.
pub fn forbid_core_dumps() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // The soft limit is the one that counts; the hard one says only how far it may be raised again.
    setrlimit(Resource::Core, Rlimit { current: Some(0), ..getrlimit(Resource::Core) })?;
    Ok(())
}

// === impl Secret ===

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text itself. Not for logs, metrics, errors or headers.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_does_not_reveal_the_text() {
        let secret = Secret::new("wJalrXUtnFEMI");
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        assert_eq!(format!("{:?}", Some(&secret)), "Some(Secret(…))");
        assert_eq!(secret.expose(), "wJalrXUtnFEMI");
    }
}
