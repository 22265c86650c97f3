//! How pods and the commands for namespaces are shown.

use std::collections::BTreeSet;

use crate::migrate::{objects::Workload, words::quoted};
use kiam_core::{pods::annotations::PERMITTED, role::RoleArn};

/// The most names in a finding.
const NAMES: usize = 3;

/// A pod by its namespace and name, or its workload by kind, too.
pub(super) fn title(pod: &Workload) -> String {
    let namespace = pod.namespace.as_deref().unwrap_or("(no namespace)");
    match pod.kind.as_str() {
        "Pod" => format!("{namespace}/{}", pod.name),
        kind => format!("{kind} {namespace}/{}", pod.name),
    }
}

/// The service account of a pod, as `--node-role` takes it.
pub(super) fn account(pod: &Workload) -> String {
    format!("{}/{}", pod.namespace.as_deref().unwrap_or("NAMESPACE"), pod.service_account)
}

/// A few of `names`, and how many there are besides.
pub(super) fn some(names: &BTreeSet<String>) -> String {
    let few: Vec<&str> = names.iter().take(NAMES).map(String::as_str).collect();
    match names.len().saturating_sub(NAMES) {
        0 => few.join(", "),
        more => format!("{} and {more} more", few.join(", ")),
    }
}

/// The command that makes `expression` what `namespace` permits.
pub(super) fn annotate(options: &str, namespace: &str, expression: &str) -> String {
    let namespace = quoted(namespace);
    format!("kubectl annotate {options}namespace {namespace} {PERMITTED}={}", quoted(expression))
}

/// An expression that matches `role` alone.
pub(super) fn literal(role: &RoleArn) -> String {
    let escape = |c| ".+".contains(c);
    role.as_ref().chars().flat_map(|c| escape(c).then_some('\\').into_iter().chain([c])).collect()
}
