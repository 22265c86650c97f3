//! What is wrong on this node as the records and the credentials are now.

use std::{collections::BTreeSet, time::Duration};

use super::EventParts;
use kiam_core::{
    credentials::{ErrorClass, State},
    pods::Pod,
    policy::{Decision, Mistake},
    role::RoleIdentity,
};

/// What may pass by itself is told of only when it lasts for so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whom an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Subject {
    Pod { namespace: String, name: String, uid: String },
    Namespace(String),
}

/// Why somebody gets no credentials, in an Event's words.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Trouble {
    pub(super) subject: Subject,
    pub(super) reason: &'static str,
    pub(super) note: String,
}

/// A trouble that there is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PresentTrouble {
    pub(super) trouble: Trouble,
    /// For how long it must last before it is worth an Event.
    pub(super) patience: Duration,
    /// Whether one Event is enough, which can wait for those that say why a pod gets no credentials.
    pub(super) once: bool,
}

/// All that there is to tell. Of pods that want no role there is nothing but that they may hold the node's credentials; of namespaces, only where such pods are on this
/// node: all nodes watch them all, and each would tell.
pub(super) fn look(parts: &EventParts) -> Vec<PresentTrouble> {
    let mut found = Vec::new();
    let mut namespaces = BTreeSet::new();
    let pods = parts.pods.all().into_iter();
    let asks = |pod: &Pod| parts.policy.role(pod).is_some();
    for pod in pods.filter(|pod| pod.live && (parts.serves)(pod)) {
        found.extend(exposed(&pod, parts));
        if asks(&pod) {
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

fn of_pod(pod: &Pod, parts: &EventParts) -> Option<PresentTrouble> {
    let (reason, note, patience) = match parts.policy.decide(pod) {
        Decision::Refuse(refusal) => {
            // Pods are watched apart from the rest.
            let patience = if refusal.may_pass() { PATIENCE } else { Duration::ZERO };
            ("RoleForbidden", refusal.to_string(), patience)
        }
        Decision::Allow(identity) => {
            let (note, patience) = lack(&identity, parts.credentials.get(&identity))?;
            ("CredentialError", note, patience)
        }
    };
    Some(PresentTrouble {
        trouble: Trouble { subject: subject(pod), reason, note },
        patience,
        once: false,
    })
}

fn exposed(pod: &Pod, parts: &EventParts) -> Option<PresentTrouble> {
    let until = humantime::format_rfc3339_seconds((parts.exposed)(pod)?);
    let note = format!(
        "the pod ran before the node's metadata service was intercepted and may hold the node's credentials until {until}; delete the pod to be rid of them earlier"
    );
    let trouble = Trouble { subject: subject(pod), reason: "NodeCredentialsExposed", note };
    Some(PresentTrouble { trouble, patience: Duration::ZERO, once: true })
}

fn subject(pod: &Pod) -> Subject {
    // A static pod's Events are about the UID that the kubelet gave it, which its mirror pod names.
    let uid = pod.config_hash.as_ref().unwrap_or(&pod.uid).to_string();
    Subject::Pod { namespace: pod.namespace.clone(), name: pod.name.clone(), uid }
}

/// Why there are no credentials, and whether that may pass; `None` where there are.
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
    /// Where its Events are: a namespace's own are in it, for those who can see no other namespace.
    pub(super) fn namespace(&self) -> &str {
        match self {
            Self::Pod { namespace, .. } | Self::Namespace(namespace) => namespace,
        }
    }
}
