//! What operators see and change.

use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use super::{knowledge::Knowledge, observe::Sightings};
use crate::{
    admin::Operations,
    credentials::{CredentialReader, State},
    lifecycle::Readiness,
    pods::Pod,
    policy::{Decision, RolePolicy},
    telemetry::{Level, LogLevel},
};

/// A process logs once.
static LOG_LEVEL: OnceLock<LogLevel> = OnceLock::new();

/// Makes the level changeable.
pub(super) fn remember(level: LogLevel) {
    // Set before by an earlier call: the same level.
    let _ = LOG_LEVEL.set(level);
}

pub(super) fn operations(readiness: &Readiness, knowledge: &Knowledge) -> Operations {
    let Knowledge { pods, policy, credentials, sightings, paths } = knowledge.clone();
    Operations {
        readiness: readiness.clone(),
        registry: Arc::default(),
        pods: Box::new(move || {
            let mut all = pods.all();
            all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
            let shown = |pod: &Arc<Pod>| {
                let mut shown = shown(pod, &policy, &credentials, &sightings);
                shown["path"] = json!(paths.of(pod));
                shown
            };
            all.iter().map(shown).collect()
        }),
        log_level: Box::new(|| LOG_LEVEL.get().map(LogLevel::get).unwrap_or_default()),
        set_log_level: Box::new(|text| {
            let level: Level = text.parse().map_err(|error| format!("{error}"))?;
            LOG_LEVEL.get().ok_or("the process does not log")?.set(level);
            Ok(())
        }),
    }
}

/// One pod with what it would be answered; no secrets.
fn shown(
    pod: &Pod,
    policy: &RolePolicy,
    credentials: &CredentialReader,
    sightings: &Sightings,
) -> Value {
    let mut shown = json!({
        "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.to_string(),
        "addresses": pod.addresses, "hostNetwork": pod.host_network, "live": pod.live,
        "annotation": pod.role,
    });
    let more = match policy.decide(pod) {
        Decision::Refuse(refusal) => json!({ "refused": refusal.to_string() }),
        Decision::Allow(identity) => {
            let state = match credentials.get(&identity) {
                None => json!("not wanted"),
                Some(State::Pending(None)) => json!("pending"),
                Some(State::Pending(Some(limit))) => json!({ "waiting": limit.to_string() }),
                Some(State::Failed { error, .. }) => json!({ "failed": error.message }),
                Some(State::Ready(issued)) => json!({
                    "accessKeyId": issued.credentials.access_key_id,
                    "expiration": humantime::format_rfc3339_seconds(issued.credentials.expires).to_string(),
                }),
            };
            json!({ "role": identity.role.to_string(), "credentials": state })
        }
    };
    if let (Value::Object(shown), Value::Object(more)) = (&mut shown, more) {
        shown.extend(more);
        let observed = sightings.of(&pod.uid);
        if !observed.is_empty() {
            shown.insert("observed".to_owned(), json!(observed));
        }
    }
    shown
}
