//! Parses flags and environment into the configuration of all parts, and reports all mistakes. Asks the node's metadata for
//! what no flag says.

mod audit;
mod flags;
mod interception;
mod kubernetes;
mod metadata;
mod migration;
mod parts;
mod preflight;
mod roles;
mod scan;
mod sts;
mod subcommands;
#[cfg(test)]
mod tests;
mod values;
mod variables;
mod warnings;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{CommandFactory as _, Parser as _};

use self::{
    flags::{CommandLine, Flags},
    interception::interception,
    values::Mistakes,
    warnings::warnings,
};
pub use self::{
    parts::Unreported,
    preflight::Preflight,
    roles::{Base, Roles},
    sts::Sts,
    values::Hosts,
};
pub use crate::admin::{Output, StatusForm};
use crate::{cluster, migrate};
pub use kiam_core::names::PodName;
use kiam_core::{
    credentials,
    rate::Rate,
    telemetry::{Format, Level, Logs},
};
use kiam_kernel::{intercept, selftest};
use kiam_requests::imds;

/// The exit status of an invalid command line (`EX_USAGE` of `sysexits.h`).
pub const USAGE: u8 = 64;

/// The subcommand that looks at all nodes of a cluster.
const CTL: &str = "ctl";
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// An environment, so that tests need not change the process's.
pub trait Vars {
    /// The variable's value, if it is set and valid UTF-8.
    fn get(&self, name: &str) -> Option<String>;
    /// The names of all variables.
    fn names(&self) -> Vec<String>;
}

/// The process's own environment.
#[derive(Clone, Copy, Debug)]
pub struct ProcessVars;

/// An empty environment.
struct NoVars;

/// The task that the command line requests.
#[derive(Debug)]
pub enum Task {
    /// Run the agent.
    Run(Box<Config>),
    /// `uninstall`.
    Uninstall {
        /// `--bpffs`.
        bpffs: PathBuf,
        /// `--state-dir`, of the agent that may use the programs.
        state_dir: PathBuf,
        /// `--boot-guard`.
        boot_guard: Option<PathBuf>,
        /// `--force`.
        force: bool,
    },
    /// `status`.
    Status {
        /// `--live`, `--ready` or `--output`.
        form: StatusForm,
        /// `--state-dir`.
        state_dir: PathBuf,
    },
    /// `explain`.
    Explain {
        /// The pod.
        pod: PodName,
        /// `--output`.
        output: Output,
        /// `--state-dir`.
        state_dir: PathBuf,
    },
    /// `pods`.
    Pods {
        /// `--state-dir`.
        state_dir: PathBuf,
    },
    /// `ctl`, which parses its own arguments.
    Ctl(Vec<String>),
    /// `refresh`.
    Refresh {
        /// The pod.
        pod: PodName,
        /// `--state-dir`.
        state_dir: PathBuf,
    },
    /// `migrate`.
    Migrate(Box<migrate::Options>),
    /// `preflight`.
    Preflight(Box<Preflight>),
    /// `selftest-client`, which the self-test runs in a temporary pod.
    SelftestClient,
    /// `pause`, which a container of `deploy/uninstall` runs: the image has no other program.
    Pause,
    /// Print this text: help, version, or a text of the boot guard.
    Print(String),
}

/// How callers are identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// By the kernel's entry for the connection.
    Kernel,
    /// By the source address alone.
    SourceIp,
}

/// The configuration of the agent.
#[derive(Debug)]
pub struct Config {
    /// `--level` and `--json-log`.
    pub logs: Logs,
    /// `--audit`, `--audit-file` and `--audit-file-size`.
    pub audit: kiam_requests::audit::Config,
    /// `--statsd` and `--statsd-interval`.
    pub statsd: Option<(SocketAddr, Duration)>,
    /// `--host`.
    pub hosts: Hosts,
    /// `--port`.
    pub port: u16,
    /// The roles of pods.
    pub roles: Roles,
    /// The Kubernetes API.
    pub cluster: cluster::Config,
    /// The interception; `None` with `--interceptor=off`.
    pub intercept: Option<intercept::Config>,
    /// `--bpffs`, also without an interceptor.
    pub bpffs: PathBuf,
    /// `--identity`.
    pub identity: Identity,
    /// `--static-pod-namespaces`.
    pub static_pod_namespaces: Vec<String>,
    /// STS.
    pub sts: Sts,
    /// `--sts-rate` and `--max-staleness`.
    pub credentials: credentials::Config,
    /// The metadata service for pods.
    pub imds: imds::Config,
    /// `--pod-rate`.
    pub pod_rate: Rate,
    /// `--upstream`.
    pub upstream: imds::UpstreamUrl,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--detach-on-exit`.
    pub detach_on_exit: bool,
    /// `--grace-period`.
    pub grace_period: Duration,
    /// `--admin`.
    pub admin: SocketAddr,
    /// `--metrics`.
    pub metrics: Option<SocketAddr>,
    /// Warnings about risky flags and unknown variables.
    pub warnings: Vec<String>,
}

/// The mistakes of a command line, one a line.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct UsageError(pub Vec<String>);

impl Vars for ProcessVars {
    fn get(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn names(&self) -> Vec<String> {
        std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect()
    }
}

/// The output of `--version`: version, commit and map layout.
#[must_use]
pub fn version() -> String {
    format!(
        "kiam-agent {} (commit {}, map layout v{})",
        env!("CARGO_PKG_VERSION"),
        env!("KIAM_COMMIT"),
        kiam_common::LAYOUT
    )
}

impl Vars for NoVars {
    fn get(&self, _: &str) -> Option<String> {
        None
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The names of the agent's flags.
#[must_use]
pub fn flag_names() -> Vec<String> {
    let command = CommandLine::command();
    command.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned).collect()
}

/// The default of a flag that has one, for checking documents against it.
#[must_use]
pub fn flag_default(name: &str) -> Option<String> {
    let command = CommandLine::command();
    let flag = command.get_arguments().find(|arg| arg.get_long() == Some(name))?;
    flag.get_default_values().first()?.to_str().map(str::to_owned)
}

/// The mistakes in `arguments` of the agent, in an empty environment.
#[must_use]
pub fn mistakes(arguments: &[String]) -> Vec<String> {
    parse(arguments, &NoVars).err().map(|error| error.0).unwrap_or_default()
}

/// Parses `arguments` (without the program's name) and the environment.
///
/// # Errors
///
/// [`UsageError`] with every mistake.
pub fn parse(arguments: &[String], vars: &dyn Vars) -> Result<Task, UsageError> {
    let first = arguments.first().map(String::as_str);
    if first == Some(CTL) {
        return Ok(Task::Ctl(arguments[1..].to_vec()));
    }
    if arguments.iter().any(|word| word == "--version") {
        return Ok(Task::Print(version()));
    }
    let helps = arguments.iter().any(|word| word == "--help" || word == "-h");
    if first == Some(preflight::SUBCOMMAND) && !helps {
        return preflight::parse(&arguments[1..], vars);
    }
    let subcommand = matches!(
        first,
        Some(
            "uninstall"
                | "boot-guard"
                | "status"
                | "explain"
                | "pods"
                | "refresh"
                | "migrate"
                | "help"
                | preflight::SUBCOMMAND
                | selftest::SUBCOMMAND
        )
    );
    if subcommand || helps {
        return subcommands::parse(arguments, vars);
    }
    config(arguments, vars).map(|config| Task::Run(Box::new(config)))
}

/// The configuration of the agent that `arguments` and the environment set.
fn config(arguments: &[String], vars: &dyn Vars) -> Result<Config, UsageError> {
    let scanned = scan::scan(&CommandLine::command(), arguments, vars);
    if let Some(mistake) = scanned.subcommand {
        return Err(UsageError(vec![mistake]));
    }
    let mut mistakes = Mistakes(scanned.mistakes);
    let config = match CommandLine::try_parse_from(scanned.arguments) {
        Ok(line) => build(&line.flags, vars, &mut mistakes),
        Err(error) => {
            mistakes.0.push(error.to_string());
            None
        }
    };
    match config {
        Some(config) if mistakes.0.is_empty() => Ok(config),
        _ => Err(UsageError(scanned.variables.named(mistakes.0))),
    }
}

/// The config; `None` if a mistake leaves a part out.
fn build(flags: &Flags, vars: &dyn Vars, mistakes: &mut Mistakes) -> Option<Config> {
    let logs = logs(flags, mistakes);
    let statsd = statsd(flags, mistakes);
    let hosts = mistakes.hosts(&flags.host);
    let port = mistakes.port(&flags.port);
    let roles = roles::roles(flags, mistakes);
    let (intercept, identity) = interception(flags, mistakes);
    let audit =
        audit::audit(flags, roles.as_ref().map(|roles| roles.policy.session_duration), mistakes);
    let credentials = sts::credentials(flags, mistakes);
    let max_staleness = credentials.and_then(|it| it.max_staleness);
    let cluster = kubernetes::cluster(
        flags,
        vars,
        kubernetes::prove_after(identity, max_staleness),
        mistakes,
    );
    let imds = metadata::metadata(flags, identity, &hosts, intercept.is_some(), mistakes);
    let pod_rate = mistakes.rate("pod-rate", &flags.pod_rate, 5, 1_000_000);
    let upstream = mistakes.parse("upstream", &flags.upstream);
    let static_pod_namespaces =
        mistakes.names("static-pod-namespaces", &flags.static_pod_namespaces);
    let sts = sts::sts(flags, vars, mistakes);
    let state_dir = mistakes.folder("state-dir", &flags.state_dir);
    let detach_on_exit = mistakes.switch("detach-on-exit", &flags.detach_on_exit);
    let grace_period = mistakes.duration("grace-period", &flags.grace_period, Duration::ZERO, DAY);
    let admin = mistakes.parse("admin", &flags.admin);
    let metrics = flags.metrics.as_ref().map(|text| mistakes.parse("metrics", text));
    let mut config = Config {
        warnings: Vec::new(),
        logs: logs?,
        audit: audit?,
        statsd: statsd?,
        hosts,
        port: port?,
        roles: roles?,
        cluster: cluster?,
        intercept,
        bpffs: flags.bpffs.clone().into(),
        identity,
        static_pod_namespaces,
        sts: sts?,
        credentials: credentials?,
        imds: imds?,
        pod_rate: pod_rate?,
        upstream: upstream?,
        state_dir: state_dir?,
        detach_on_exit,
        grace_period: grace_period?,
        admin: admin?,
        metrics: given(metrics)?,
    };
    config.warnings = warnings(&config, flags, vars);
    Some(config)
}

/// An optional flag: `None` only if it is set and wrong.
fn given<T>(value: Option<Option<T>>) -> Option<Option<T>> {
    match value {
        Some(None) => None,
        Some(good) => Some(good),
        None => Some(None),
    }
}

fn logs(flags: &Flags, mistakes: &mut Mistakes) -> Option<Logs> {
    let json = mistakes.switch("json-log", &flags.json_log);
    let level: Option<Level> = mistakes.parse("level", &flags.level);
    Some(Logs { level: level?, format: if json { Format::Json } else { Format::Text } })
}

fn statsd(flags: &Flags, mistakes: &mut Mistakes) -> Option<Option<(SocketAddr, Duration)>> {
    let interval = mistakes.duration("statsd-interval", &flags.statsd_interval, SECOND / 10, DAY);
    let server = match flags.statsd.as_deref().filter(|text| !text.is_empty()) {
        None => return Some(None),
        Some(text) => mistakes.parse("statsd", text),
    };
    Some(Some((server?, interval?)))
}
