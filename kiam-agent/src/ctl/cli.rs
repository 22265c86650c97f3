//! The command line of `kubectl kiam`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use kiam_core::names::{PodName, is_label};

/// Shows what the agents of a cluster do, and why a pod has no credentials
///
/// It runs kiam-agent's own commands in the agents' pods, by exec, with the rights of your kubeconfig.
#[derive(Debug, Parser)]
#[command(
    name = "kubectl-kiam",
    bin_name = "kubectl kiam",
    version,
    disable_help_subcommand = true,
    subcommand_value_name = "COMMAND"
)]
pub(super) struct CommandLine {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// The flags of all subcommands.
#[derive(Clone, Debug, Args)]
pub(super) struct Global {
    /// Kubeconfig file; absent: as kubectl, KUBECONFIG or ~/.kube/config
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig; absent: the current one
    #[arg(long, global = true, value_name = "NAME")]
    pub(super) context: Option<String>,
    /// Namespace of the agents' pods
    #[arg(long, global = true, value_name = "NAMESPACE", default_value = "kube-system", value_parser = namespace)]
    pub(super) agent_namespace: String,
    /// Labels of the agents' pods
    #[arg(
        long,
        global = true,
        value_name = "LABELS",
        default_value = "app.kubernetes.io/name=kiam-agent"
    )]
    pub(super) agent_selector: String,
    /// Form of the output
    #[arg(long, short, global = true, value_enum, value_name = "FORM", default_value = "text")]
    pub(super) output: Form,
    /// When to use colours
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value = "auto")]
    pub(super) color: Colors,
    /// Longest wait for one node; absent: 20s, for check 3m
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration)]
    pub(super) timeout: Option<Duration>,
    /// Number of nodes that are asked at once
    #[arg(long, global = true, value_name = "NUMBER", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=512))]
    pub(super) parallel: u16,
    /// Repeat until interrupted, with this pause between; without a value: 2s
    #[arg(long, short, global = true, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "2s", value_parser = duration)]
    pub(super) watch: Option<Duration>,
}

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Form {
    /// Aligned lines for people
    Text,
    Json,
    Yaml,
}

/// When colours are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Colors {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    Always,
    Never,
}

/// The subcommands.
#[derive(Clone, Debug, Subcommand)]
pub(super) enum Command {
    /// Show the agent of each node; exit 0 when all are ready, else 1
    Status {
        /// Only this node (repeatable)
        #[arg(long, value_name = "NODE")]
        node: Vec<String>,
    },
    /// Show which credentials a pod gets, and why; exit 0 when it gets some, else 1
    Explain {
        /// Namespace and name of the pod
        #[arg(value_name = "NAMESPACE/POD")]
        pod: PodName,
    },
    /// Show the pods that name a role or asked for something
    Pods {
        #[command(flatten)]
        selection: Selection,
        /// Also pods that neither name a role nor asked
        #[arg(long)]
        all: bool,
    },
    /// Renew a pod's credentials now; exit 0 when they were issued, else 1
    Refresh {
        /// Namespace and name of the pod
        #[arg(value_name = "NAMESPACE/POD")]
        pod: PodName,
    },
    /// Print an agent's log, or its lines about a pod
    Logs {
        /// Namespace and name of a pod, or the name of a node
        #[arg(value_name = "NAMESPACE/POD|NODE")]
        of: String,
        /// Wait for new lines, and print them
        #[arg(long, short)]
        follow: bool,
        /// The log of the agent's previous container
        #[arg(long, short)]
        previous: bool,
        /// Number of lines of the agent's log that are read, from its end
        #[arg(long, value_name = "NUMBER", default_value = "1000")]
        tail: u32,
        /// Only lines younger than this
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        since: Option<Duration>,
    },
    /// Show the pods that ask without a session token (IMDSv1), and by which programs
    V1Users {
        #[command(flatten)]
        selection: Selection,
    },
    /// Run the preflight of each node's agent; exit 0 when no check fails, else 1
    Check {
        /// Only this node (repeatable)
        #[arg(long, value_name = "NODE")]
        node: Vec<String>,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        #[arg(value_enum, value_name = "SHELL")]
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

/// Which pods are shown.
#[derive(Clone, Debug, Args)]
pub(super) struct Selection {
    /// Only pods of this namespace (repeatable)
    #[arg(long, short, value_name = "NAMESPACE", value_parser = namespace)]
    pub(super) namespace: Vec<String>,
    /// Only pods of this node (repeatable)
    #[arg(long, value_name = "NODE")]
    pub(super) node: Vec<String>,
}

fn duration(text: &str) -> Result<Duration, String> {
    let read = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match read.is_zero() {
        true => Err("it must be longer than nothing".to_owned()),
        false => Ok(read),
    }
}

fn namespace(text: &str) -> Result<String, String> {
    match is_label(text) {
        true => Ok(text.to_owned()),
        false => Err("that is not the name of a namespace".to_owned()),
    }
}
