//! Finds the present troubles of this node's pods, from the records and the credentials.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{EventParts, Exposed};
use kiam_core::{
    credentials::{ErrorClass, State},
    pods::Pod,
    policy::{Decision, Mistake},
    role::RoleIdentity,
};

/// How long a trouble that may pass by itself must last before it is reported.
const PATIENCE: Duration = Duration::from_secs(60);

/// The object that an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Subject {
    Pod { namespace: String, name: String, uid: String },
    Namespace(String),
}

/// A reason why a pod gets no credentials, in an Event's words.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Trouble {
    pub(super) subject: Subject,
    pub(super) reason: &'static str,
    pub(super) note: String,
}

/// A trouble that exists now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PresentTrouble {
    pub(super) trouble: Trouble,
    /// How long it must last before it is reported.
    pub(super) patience: Duration,
    /// Whether it is reported once only, after all others.
    pub(super) once: bool,
}

/// The present troubles. Pods that request no role are reported only if they may hold the node's credentials. Namespaces
/// are reported only by nodes with pods of theirs that request a role: all nodes watch all namespaces.
pub(super) fn scan(parts: &EventParts) -> Vec<PresentTrouble> {
    let mut found = Vec::new();
    let mut namespaces = BTreeSet::new();
    let pods = parts.pods.all().into_iter();
    let requests_role = |pod: &Pod| parts.policy.role(pod).is_some();
    for pod in pods.filter(|pod| pod.live && (parts.serves)(pod)) {
        found.extend(exposure(&pod, parts));
        if requests_role(&pod) {
            found.extend(of_pod(&pod, parts));
            namespaces.insert(pod.namespace.clone());
        }
    }
    for name in namespaces {
        let namespace = parts.pods.namespace(&name);
        let mistakes = namespace.iter().flat_map(|namespace| parts.policy.mistakes(namespace));
        found.extend(mistakes.map(|mistake| of_namespace(&name, &mistake)));
    }
    found
}

fn of_pod(pod: &Arc<Pod>, parts: &EventParts) -> Option<PresentTrouble> {
    let (reason, note, patience) = match parts.policy.standing(pod).decision() {
        Decision::Refuse(refusal) => {
            // Pods are watched independently of namespaces and ServiceAccounts.
            let patience = if refusal.may_pass() { PATIENCE } else { Duration::ZERO };
            ("RoleForbidden", refusal.to_string(), patience)
        }
        Decision::Allow(identity) => {
            let (note, patience) = lack(identity, parts.credentials.get(identity))?;
            ("CredentialError", note, patience)
        }
    };
    Some(PresentTrouble {
        trouble: Trouble { subject: subject(pod), reason, note },
        patience,
        once: false,
    })
}

fn exposure(pod: &Pod, parts: &EventParts) -> Option<PresentTrouble> {
    let Exposed { until, age } = (parts.exposed)(pod)?;
    let until = humantime::format_rfc3339_seconds(until);
    let note = format!(
        "{age} may hold the node's credentials until {until}; recreate the pod to end that earlier"
    );
    let trouble = Trouble { subject: subject(pod), reason: "NodeCredentialsExposed", note };
    Some(PresentTrouble { trouble, patience: Duration::ZERO, once: true })
}

fn subject(pod: &Pod) -> Subject {
    // A static pod's Events refer to the UID that the kubelet gave it, which is in its mirror pod.
    let uid = pod.config_hash.as_ref().unwrap_or(&pod.uid).to_string();
    Subject::Pod { namespace: pod.namespace.clone(), name: pod.name.clone(), uid }
}

/// Why there are no credentials, and how long that must last; `None` if there are.
fn lack(identity: &RoleIdentity, state: Option<State>) -> Option<(String, Duration)> {
    let patience = match &state {
        Some(State::Failed { error, .. }) if error.class == ErrorClass::Denied => Duration::ZERO,
        _ => PATIENCE,
    };
    let lack = State::lack(state.as_ref())?;
    Some((format!("no credentials of {}: {lack}", identity.role), patience))
}

fn of_namespace(name: &str, mistake: &Mistake) -> PresentTrouble {
    let (reason, note) = (mistake.reason(), mistake.to_string());
    let subject = Subject::Namespace(name.to_owned());
    PresentTrouble {
        trouble: Trouble { subject, reason, note },
        patience: Duration::ZERO,
        once: false,
    }
}

// === impl Subject ===

impl Subject {
    /// The namespace of its Events. Those about a namespace are in that namespace, where its users can read them.
    pub(super) fn namespace(&self) -> &str {
        match self {
            Self::Pod { namespace, .. } | Self::Namespace(namespace) => namespace,
        }
    }
}
