//! Why there is nothing to print.

use std::io;

use super::input::Place;
use crate::{cluster, peers::Program};

/// Why there is nothing to print. A retry does not help, but for the cluster's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read.
    #[error(
        "{source_name}: can't read it: {error}; name files with manifests, or - for standard input"
    )]
    Read {
        /// The file.
        source_name: String,
        /// The error.
        error: io::Error,
    },
    /// A document is not YAML.
    #[error(
        "{place}{}: not YAML: {problem}; {}",
        line.map_or_else(String::new, |line| format!(", line {line}")),
        if *template { "it is a template: print the manifests with helm template or helm get manifest" }
        else { "pass manifests, as kubectl get -o yaml or helm template prints them" }
    )]
    NotYaml {
        /// The document.
        place: Place,
        /// The line in the file.
        line: Option<usize>,
        /// What is wrong.
        problem: String,
        /// Whether it looks like one of Helm's templates.
        template: bool,
    },
    /// A document begins as JSON, and is not.
    #[error("{place}: not JSON: {error}; pass manifests, as kubectl get -o json prints them")]
    NotJson {
        /// The document.
        place: Place,
        /// The error.
        error: serde_json::Error,
    },
    /// A document is no object.
    #[error(
        "{place}: {found} is no Kubernetes object; pass manifests, as kubectl get -o yaml prints them"
    )]
    NoObject {
        /// The document.
        place: Place,
        /// How it begins.
        found: String,
    },
    /// No container is kiam's or kube2iam's.
    #[error("{}", nothing_found(*workloads, *others, *without_kind, selected))]
    NothingFound {
        /// How many workloads were read.
        workloads: usize,
        /// How many objects of other kinds.
        others: usize,
        /// How many documents without a kind.
        without_kind: usize,
        /// The selection, for the message.
        selected: String,
    },
    /// Both kiam and kube2iam are there.
    #[error(
        "{one} and {other} are kiam and kube2iam: migrate one at a time; choose it by --namespace and --name"
    )]
    BothPeers {
        /// One of them.
        one: String,
        /// The other.
        other: String,
    },
    /// Parts are of several namespaces.
    #[error(
        "{} are of several namespaces, and an installation is of one: choose it by --namespace or, where it really is \
         of several, each part by --name=NAMESPACE/NAME",
        parts.join(", ")
    )]
    SeveralNamespaces {
        /// The parts.
        parts: Vec<String>,
    },
    /// kiam v1's program is there beside those of later versions.
    #[error(
        "{first} is kiam v1, and {later} is a later version: migrate one at a time; choose it by --namespace and --name"
    )]
    SeveralVersions {
        /// The part of v1.
        first: String,
        /// The part of a later version.
        later: String,
    },
    /// Two workloads run the same program with different flags.
    #[error(
        "{one} and {other} run the same program ({program}) with different flags: migrate one at a time; choose it by \
         --namespace and --name"
    )]
    SeveralAlike {
        /// The program.
        program: Program,
        /// One of them.
        one: String,
        /// The other.
        other: String,
    },
    /// `--kiam-version` is not what was found.
    #[error("--kiam-version: {found} is not kiam v{given}: leave the flag out")]
    OtherVersion {
        /// The version of the command line.
        given: u8,
        /// What was found.
        found: String,
    },
    /// The cluster can't be read.
    #[error("can't read the cluster: {0}")]
    Cluster(#[from] cluster::InventoryError),
    /// No runtime.
    #[error("can't start a runtime: {0}")]
    Runtime(#[source] io::Error),
}

fn nothing_found(workloads: usize, others: usize, without_kind: usize, selected: &str) -> String {
    let mut text = format!(
        "no container of kiam or kube2iam{selected} among {workloads} workloads and {others} other objects"
    );
    text += match (workloads, without_kind) {
        (0, 1..) => {
            ": the input has documents without a kind, such as Helm's values; print the manifests with helm template or helm get manifest"
        }
        (_, _) => ": pass the manifests of its DaemonSets and Deployments",
    };
    text
}
