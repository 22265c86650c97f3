//! What a reader must know of the machine that something was measured on.

use std::fs;
use std::thread;

/// The machine, as far as it can be found out.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Machine {
    /// The processor's name.
    pub(super) processor: String,
    /// How many of its threads we may use.
    pub(super) cores: usize,
    /// Whether a hypervisor is below.
    pub(super) is_virtual: bool,
    /// The kernel's release.
    pub(super) kernel: String,
}

// === impl Machine ===

impl Machine {
    /// Looks at it.
    pub(super) fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            processor: processor(&cpuinfo).unwrap_or("unknown").to_owned(),
            cores: thread::available_parallelism().map_or(1, usize::from),
            is_virtual: is_virtual(&cpuinfo),
            kernel: kernel.trim().to_owned(),
        }
    }
}

/// The load averages of the last 1, 5 and 15 minutes, as the kernel says them.
pub(super) fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Arm's cpuinfo has numbers only; the implementer's is better than nothing.
fn processor(cpuinfo: &str) -> Option<&str> {
    let named = |name: &str| {
        let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
    };
    named("model name").or_else(|| named("CPU part"))
}

fn is_virtual(cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.any(|line| line.split(' ').any(|flag| flag == "hypervisor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuinfo_names_the_processor_and_the_hypervisor() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu hypervisor lm\n";
        assert_eq!(processor(text), Some("Some CPU @ 2 GHz"));
        assert!(is_virtual(text));
        let arm = "processor\t: 0\nCPU part\t: 0xd40\n";
        assert_eq!(processor(arm), Some("0xd40"));
        assert!(!is_virtual(arm));
    }
}
