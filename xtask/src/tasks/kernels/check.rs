//! What is checked, and where.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::{
    architecture::Architecture,
    debian::Series,
    job::{Job, Reports},
};

/// The oldest kernel that the agent supports, and two that many nodes run.
const OLDEST: Series = Series::Named(5, 10);
const OLD: Series = Series::Named(6, 1);
const MIDDLE: Series = Series::Named(6, 12);

/// What guests' command lines ask for beside what every guest has.
pub(super) const NO_IPV6: &str = "ipv6.disable=1";
pub(super) const NO_JIT: &str = "sysctl.net.core.bpf_jit_enable=0";
/// The kernel does not know it: process 1 hides `/sys/kernel/btf`.
pub(super) const NO_BTF: &str = "kiam.btf=hidden";
pub(super) const INTEGRITY: &str = "lockdown=integrity";
pub(super) const CONFIDENTIALITY: &str = "lockdown=confidentiality";

/// Names the rows of a guest, to a test that plays all without it.
const ROWS: &str = "KIAM_KERNEL_ROWS";
/// Those that load and attach every program.
const FEW: &str = "defaults,--guard";

/// The agent's tests whose subject is the kernel, and the seconds that each may take by the guest's clock.
const TESTS: [(&str, u64); 16] = [
    ("intercept", 300),
    ("listener", 300),
    ("lease", 300),
    ("namespaces", 300),
    ("selftest", 300),
    ("observe", 300),
    ("startup_taint", 300),
    ("node", 600),
    ("node_pods", 600),
    ("node_faults", 600),
    ("pod_local", 600),
    ("sandboxes", 600),
    ("guard", 600),
    ("matrix", 600),
    ("takeover", 600),
    ("lifecycle", 600),
];

/// The test of `programs` that needs processors of its own: with one by emulation, the pod that binds without a pause leaves
/// the agent's rounds no time.
const NEEDS_PROCESSORS: &str = "pods_that_bind_without_a_pause";

/// What guests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Check {
    /// Every kernel program is loaded, verified and attached.
    Load,
    /// The agent starts, passes its self-test and serves; with other flags too.
    Agent,
    /// The demo.
    Demo,
    /// The agent's tests as a process.
    Tests,
}

/// One guest that is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) check: Check,
    pub(super) architecture: Architecture,
    pub(super) series: Series,
    /// For the kernel's command line.
    pub(super) parameters: &'static str,
}

// === impl Check ===

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().expect("no check is hidden").get_name())
    }
}

impl Check {
    pub(super) fn places(self) -> Vec<Place> {
        use Architecture::{Amd64, Arm64};
        let places: &[(Architecture, Series, &'static str)] = match self {
            Self::Load => &[
                (Amd64, OLDEST, ""),
                (Amd64, OLD, ""),
                (Amd64, MIDDLE, ""),
                (Amd64, Series::Newest, ""),
                (Arm64, OLD, ""),
                (Arm64, Series::Newest, ""),
            ],
            Self::Agent => &[
                (Amd64, OLDEST, ""),
                (Amd64, OLDEST, NO_IPV6),
                (Amd64, OLDEST, NO_JIT),
                (Amd64, OLDEST, NO_BTF),
                (Amd64, OLDEST, INTEGRITY),
                (Amd64, OLDEST, CONFIDENTIALITY),
                (Amd64, OLD, ""),
                (Amd64, Series::Newest, ""),
                (Amd64, Series::Newest, NO_IPV6),
                (Amd64, Series::Newest, NO_JIT),
                (Amd64, Series::Newest, NO_BTF),
                (Amd64, Series::Newest, INTEGRITY),
                (Amd64, Series::Newest, CONFIDENTIALITY),
                (Arm64, OLD, ""),
                (Arm64, Series::Newest, ""),
            ],
            Self::Demo => {
                &[(Amd64, OLDEST, ""), (Amd64, OLD, ""), (Amd64, MIDDLE, ""), (Arm64, OLD, "")]
            }
            Self::Tests => &[(Amd64, OLDEST, ""), (Amd64, OLD, ""), (Amd64, MIDDLE, "")],
        };
        let place = |&(architecture, series, parameters)| Place {
            check: self,
            architecture,
            series,
            parameters,
        };
        places.iter().map(place).collect()
    }

    /// The agent's tests that it needs.
    pub(super) fn tests(self) -> Vec<&'static str> {
        match self {
            Self::Load => vec!["programs"],
            Self::Agent => vec!["kernels"],
            Self::Demo => Vec::new(),
            Self::Tests => TESTS.map(|(test, _)| test).to_vec(),
        }
    }

    /// Processors, and memory in MiB.
    pub(super) fn size(self) -> (u32, u32) {
        match self {
            Self::Load => (1, 1024),
            Self::Agent | Self::Demo => (2, 2048),
            Self::Tests => (2, 4096),
        }
    }

    /// What its guests have of what was compiled; the agent's tests start all of it.
    pub(super) fn needs(self, program: &str) -> bool {
        match self {
            Self::Load => ["xtask", "programs"].contains(&program),
            Self::Agent => ["xtask", "kernels", "kiam-agent", "lab"].contains(&program),
            Self::Demo => ["xtask", "kiam-agent", "lab"].contains(&program),
            Self::Tests => true,
        }
    }
}

// === impl Place ===

impl Place {
    /// What its guest runs, of what was compiled.
    pub(super) fn jobs(&self, programs: &BTreeMap<String, PathBuf>) -> Result<Vec<Job>> {
        let job = |name: &str, program: &str, arguments: &[&str], seconds, reports| {
            let path = programs.get(program);
            Ok(Job {
                name: name.to_owned(),
                program: path.with_context(|| format!("cargo names no {program}"))?.clone(),
                arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
                variable: self.rows().map(|rows| (ROWS.to_owned(), rows.to_owned())),
                seconds,
                reports,
            })
        };
        let alone = ["--nocapture", "--test-threads", "1"];
        let test = |name, seconds, reports| job(name, name, &alone, seconds, reports);
        match self.check {
            Check::Load => {
                let arguments = [&alone[..], &["--skip", NEEDS_PROCESSORS]].concat();
                Ok(vec![job("programs", "programs", &arguments, 60, Reports::Rows)?])
            }
            Check::Agent => Ok(vec![test("kernels", 300, Reports::Rows)?]),
            Check::Demo => Ok(vec![job("demo", "lab", &["demo"], 300, Reports::Verdict)?]),
            // Those that were chosen, and so compiled.
            Check::Tests => TESTS
                .iter()
                .filter(|(name, _)| programs.contains_key(*name))
                .map(|&(name, seconds)| test(name, seconds, Reports::Tests))
                .collect(),
        }
    }

    /// The rows that the agent plays, where it plays not all: emulation is slow.
    fn rows(&self) -> Option<&'static str> {
        let ends = self.architecture == Architecture::Amd64 && self.series != OLD;
        match (self.check, self.parameters) {
            (Check::Agent, "") if !ends => Some(FEW),
            (Check::Agent, NO_IPV6) => Some(FEW),
            (Check::Agent, parameters) if !parameters.is_empty() => Some("--guard"),
            _ => None,
        }
    }

    /// Whether `only` names its series or architecture.
    pub(super) fn is(&self, only: &str) -> bool {
        let amd64 = self.architecture == Architecture::Amd64;
        only == self.architecture.to_string() || amd64 && only == self.series.to_string()
    }

    /// What its log is called.
    pub(super) fn name(&self, kernel: &str) -> String {
        let further = self.parameters.replace(['=', '.'], "-");
        format!("{}-{kernel}-{further}", self.check).trim_end_matches('-').to_owned()
    }
}
