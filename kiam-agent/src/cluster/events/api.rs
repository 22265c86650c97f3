//! Writes Events of `events.k8s.io/v1`.
//!
//! `kube::runtime::events::Recorder` ignores the note when it compares Events, so that a pod's second error would count
//! as its first, and forgets Events after six minutes. Here an Event's name is a hash of its subject, reason and note: an
//! agent that restarts or takes over continues its predecessor's Events.

use std::time::Duration;

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
    core::Status,
};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::time;

use super::trouble::{Subject, Trouble};
use kiam_core::clock::Clock;

/// The deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);

/// The API server's limits, in bytes
/// (<https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/events.go>).
const LONGEST_NOTE: usize = 1024;
const LONGEST_INSTANCE: usize = 128;
/// The longest prefix of a name: 253 bytes less the hash and its dot.
const LONGEST_NAME: usize = 253 - 17;

const CONTROLLER: &str = "kiam-agent";

/// A writer of Events.
pub(super) struct Writer {
    pub(super) client: kube::Client,
    /// The reporting instance: the node's name.
    pub(super) instance: String,
    pub(super) clock: Clock,
}

/// How an Event was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteOutcome {
    Created,
    Repeated,
    /// Another node has reported the namespace's mistake.
    Exists,
}

/// Why an Event was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// An error that may pass; the request is retried.
    #[error("{}", super::super::describe(.0))]
    Request(#[from] kube::Error),
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Deadline(#[from] time::error::Elapsed),
    /// The agent lacks a right.
    #[error(
        "the agent may not write Events: its ClusterRole lacks create and patch of events in events.k8s.io: {0}"
    )]
    Forbidden(String),
    /// The server rejects this Event, whenever it is written.
    #[error("the server rejects the Event: {0}")]
    Rejected(String),
}

// === impl Writer ===

impl Writer {
    /// Reports `trouble` for the `count`th time.
    pub(super) async fn write(
        &self,
        trouble: &Trouble,
        count: i32,
    ) -> Result<WriteOutcome, Failure> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), trouble.subject.namespace());
        let name = name(trouble);
        if count > 1 {
            match self.repeat(&events, &name, count).await {
                // The Event has expired.
                Err(Failure::Request(error)) if is(&error, 404) => {}
                repeated => return repeated,
            }
        }
        let event = self.event(name.clone(), trouble);
        let parameters = PostParams::default();
        let created = time::timeout(DEADLINE, events.create(&parameters, &event)).await?;
        match created {
            Ok(_) => Ok(WriteOutcome::Created),
            Err(error) if is(&error, 409) => match trouble.subject {
                Subject::Pod { .. } => self.repeat(&events, &name, count.max(2)).await,
                Subject::Namespace(_) => Ok(WriteOutcome::Exists),
            },
            Err(error) => Err(Failure::of(error)),
        }
    }

    async fn repeat(
        &self,
        events: &Api<Event>,
        name: &str,
        count: i32,
    ) -> Result<WriteOutcome, Failure> {
        let series = json!({ "series": { "count": count, "lastObservedTime": self.now() } });
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(series));
        let patched = time::timeout(DEADLINE, events.patch(name, &parameters, &patch)).await?;
        match patched {
            Ok(_) => Ok(WriteOutcome::Repeated),
            Err(error) if is(&error, 404) => Err(Failure::Request(error)),
            Err(error) => Err(Failure::of(error)),
        }
    }

    fn event(&self, name: String, trouble: &Trouble) -> Event {
        let namespace = Some(trouble.subject.namespace().to_owned());
        let (kind, regarding, uid) = match &trouble.subject {
            Subject::Pod { name, uid, .. } => ("Pod", name, Some(uid.clone())),
            Subject::Namespace(name) => ("Namespace", name, None),
        };
        let regarding = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(kind.to_owned()),
            namespace: namespace.clone(),
            name: Some(regarding.clone()),
            uid,
            ..ObjectReference::default()
        };
        Event {
            metadata: ObjectMeta { name: Some(name), namespace, ..ObjectMeta::default() },
            event_time: Some(self.now()),
            regarding: Some(regarding),
            type_: Some("Warning".to_owned()),
            reason: Some(trouble.reason.to_owned()),
            action: Some("GiveCredentials".to_owned()),
            note: Some(cut(&trouble.note, LONGEST_NOTE).to_owned()),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(cut(&self.instance, LONGEST_INSTANCE).to_owned()),
            ..Event::default()
        }
    }

    fn now(&self) -> MicroTime {
        MicroTime(Timestamp::try_from(self.clock.now()).unwrap_or(Timestamp::UNIX_EPOCH))
    }
}

/// The Event's name, which is the same for every agent.
fn name(trouble: &Trouble) -> String {
    let (name, uid) = match &trouble.subject {
        Subject::Pod { name, uid, .. } => (name, uid.as_str()),
        Subject::Namespace(name) => (name, ""),
    };
    let hash = Sha256::digest([uid, trouble.reason, &trouble.note].join("\n"));
    let hash = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
    // A part of a name must not end in these.
    format!("{}.{hash}", cut(name, LONGEST_NAME).trim_end_matches(['-', '.']))
}

/// The beginning of `text`, of at most `longest` bytes.
fn cut(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

// === impl Failure ===

impl Failure {
    fn of(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else { return Self::Request(error) };
        let message = status.message.clone();
        match status.code {
            403 if is_ending(&status) => Self::Rejected(message),
            403 => Self::Forbidden(message),
            // Too early, too many, or an expired token: all of these pass.
            401 | 408 | 429 => Self::Request(kube::Error::Api(status)),
            400..500 => Self::Rejected(message),
            _ => Self::Request(kube::Error::Api(status)),
        }
    }
}

/// Whether the request failed because the namespace is being deleted.
fn is_ending(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(name: &str, note: &str) -> Trouble {
        let (namespace, uid) = ("shop".to_owned(), "u".to_owned());
        let subject = Subject::Pod { namespace, name: name.to_owned(), uid };
        Trouble { subject, reason: "RoleForbidden", note: note.to_owned() }
    }

    #[test]
    fn names_are_of_what_is_said_and_short_enough() {
        let named = |name: &str, note: &str| super::name(&trouble(name, note));
        assert_eq!(named("orders", "no"), named("orders", "no"));
        assert_ne!(named("orders", "no"), named("orders", "never"));
        let name = named(&format!("{}.b", "a".repeat(LONGEST_NAME - 1)), "no");
        assert!(name.len() <= 253 && !name.contains(".."), "{name}");
        assert_eq!(cut("aé", 2), "a");
    }
}
