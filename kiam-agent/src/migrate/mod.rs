//! `kiam-agent migrate`: reads an installation of kiam or kube2iam, and prints the agent's arguments for it, what becomes
//! of each flag, and what changes for pods. It changes nothing.

mod error;
mod input;
mod installation;
mod meaning;
mod objects;
mod report;
mod route;
mod rules;
mod settings;
mod translate;
mod words;

use std::{fmt, path::PathBuf};

pub use self::{
    error::Error,
    input::{Place, Source},
    settings::Output,
};
use self::{
    input::Object,
    installation::Installation,
    objects::{Inventory, Workload},
    report::Report,
    translate::Manner,
};
use crate::{cluster, printable, proxy::Proxies};
use kiam_core::role::BaseArn;

/// The exit status where somebody must decide something.
pub const DECISIONS: u8 = 2;

/// The mistakes that the agent's own parser finds in arguments.
pub type Checker<'a> = &'a dyn Fn(&[String]) -> Vec<String>;

/// What to read and how to print it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The manifests.
    pub input: Input,
    /// The workloads that may be the installation.
    pub selection: Selection,
    /// The form of the output.
    pub output: Output,
    /// Whether the arguments are for an agent that observes beside the old one.
    pub observes: bool,
    /// The version of kiam, if the operator names it.
    pub kiam_version: Option<u8>,
    /// The base of short names for the comparison, if the operator names it.
    pub base: Option<BaseArn>,
}

/// The source of the objects.
#[derive(Clone, Debug)]
pub enum Input {
    /// Files and standard input.
    Sources(Vec<Source>),
    /// A cluster.
    Cluster {
        /// `--kubeconfig`; without it, the cluster that this process runs in.
        kubeconfig: Option<PathBuf>,
        /// Proxies for the API server.
        proxies: Box<Proxies>,
    },
}

/// The workloads that may be the installation; without a name, all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// `--namespace`.
    pub namespace: Option<String>,
    /// `--name`, with or without a namespace before it.
    pub names: Vec<String>,
}

/// What is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// The arguments in their form, and below them the report as comments.
    pub text: String,
    /// How many things somebody must decide.
    pub decisions: usize,
}

/// Reads the installation, and translates it to arguments that `check` accepts.
///
/// # Errors
///
/// [`Error`] when the input can't be read, or has not one installation.
pub fn migrate(options: &Options, check: Checker<'_>) -> Result<Migration, Error> {
    let objects = read(&options.input)?;
    let inventory = Inventory::new(&objects);
    let installation = Installation::find(&inventory, &options.selection, options.kiam_version)?;
    let manner = Manner { observes: options.observes };
    let translation = translate::translate(&installation, manner, check);
    let comparison =
        meaning::compare(&installation, &translation.settings, &inventory, options.base.as_ref());
    let report = Report {
        installation: &installation,
        translation: &translation,
        comparison: &comparison,
        rules: &rules::rules(&installation),
    };
    let text = format!("{}#\n{}", translation.settings.print(options.output), report.text());
    Ok(Migration { text, decisions: report.decisions() })
}

fn read(input: &Input) -> Result<Vec<Object>, Error> {
    let (kubeconfig, proxies) = match input {
        Input::Sources(sources) => return input::read(sources),
        Input::Cluster { kubeconfig, proxies } => (kubeconfig.as_deref(), proxies),
    };
    let place = Place { source: "the cluster".to_owned(), document: 0 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::Runtime)?;
    let values = runtime.block_on(cluster::inventory(kubeconfig, proxies))?;
    Ok(values.into_iter().map(|value| Object { place: place.clone(), value }).collect())
}

// === impl Selection ===

impl Selection {
    fn has(&self, workload: &Workload) -> bool {
        let namespace = self.namespace.as_ref();
        namespace.is_none_or(|namespace| workload.namespace.as_ref() == Some(namespace))
            && (self.names.is_empty()
                || self.names.contains(&workload.name)
                || self.names_exactly(workload))
    }

    /// Whether a name is that of `workload` with its namespace.
    fn names_exactly(&self, workload: &Workload) -> bool {
        let name = workload.namespace.as_ref().map(|it| format!("{it}/{}", workload.name));
        name.is_some_and(|name| self.names.contains(&name))
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, " in namespace {namespace}")?;
        }
        if !self.names.is_empty() {
            write!(f, " named {}", self.names.join(" or "))?;
        }
        Ok(())
    }
}
