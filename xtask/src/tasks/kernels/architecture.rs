//! What differs between guests of one architecture and of another.

use std::fmt;

/// What a guest's processor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// `x86_64`, this machine's own.
    Amd64,
    /// `aarch64`.
    Arm64,
}

// === impl Architecture ===

impl Architecture {
    /// The last part of the names of Debian's kernels.
    pub(super) fn flavour(self) -> String {
        format!("-cloud-{self}")
    }

    /// Rust's name for it.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Where Debian puts shared libraries, below `/lib` and `/usr/lib`.
    pub(super) fn libraries(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// QEMU's program.
    pub(super) fn qemu(self) -> &'static str {
        match self {
            Self::Amd64 => "qemu-system-x86_64",
            Self::Arm64 => "qemu-system-aarch64",
        }
    }

    /// QEMU's program that runs programs alone.
    pub(super) fn qemu_user(self) -> &'static str {
        match self {
            Self::Amd64 => "qemu-x86_64",
            Self::Arm64 => "qemu-aarch64",
        }
    }

    /// The machine that QEMU emulates, with a processor that it emulates well.
    pub(super) fn machine(self) -> [&'static str; 4] {
        match self {
            Self::Amd64 => ["-machine", "q35", "-cpu", "max,la57=off,erms=off,fsrm=off"],
            Self::Arm64 => ["-machine", "virt", "-cpu", "cortex-a57"],
        }
    }

    /// Its kernel's command line: the console, and what emulation needs.
    pub(super) fn parameters(self) -> &'static str {
        match self {
            Self::Amd64 => "console=ttyS0 panic=-1 quiet no_timer_check",
            Self::Arm64 => "console=ttyAMA0 panic=-1 quiet",
        }
    }
}

impl fmt::Display for Architecture {
    /// As Debian has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        })
    }
}
