//! The account of one pod, as JSON and as text.

use std::{
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Settings, requests};
use crate::{
    cluster::{Age, Exposed},
    older_pods::Grounds,
};
use kiam_core::{
    credentials::State,
    pods::{Annotation, Namespace, NotFound, Pod},
    policy::{Decision, Refusal, Ruling, Rulings},
    role::RoleArn,
};
use kiam_requests::imds::{self, Imdsv2, PathKind, RecordedRequest};

/// Everything that is known of one pod, at one moment.
pub(super) struct Account<'a> {
    pub(super) pod: Arc<Pod>,
    pub(super) namespace: Option<Arc<Namespace>>,
    pub(super) role: Option<Result<RoleArn, Refusal>>,
    pub(super) rulings: Option<Rulings>,
    pub(super) decision: Decision,
    /// Why the agent does not find the pod when it asks, if it is a static pod.
    pub(super) missing: Option<NotFound>,
    pub(super) credentials: Option<State>,
    /// How the pod's connections reach the agent, or why they don't.
    pub(super) path: Result<String, String>,
    pub(super) journal: imds::Page,
    /// Until when the pod may hold the node's credentials.
    pub(super) exposed: Option<Exposed>,
    /// Why the pod gets the node's credentials, if it does.
    pub(super) grounds: Option<Grounds>,
    pub(super) now: SystemTime,
    pub(super) settings: &'a Settings,
}

// === impl Account ===

impl Account<'_> {
    /// What `/pods` shows.
    pub(super) fn json(&self) -> Value {
        let pod = &self.pod;
        let mut shown = json!({
            "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.to_string(),
            "addresses": pod.addresses, "hostNetwork": pod.host_network, "live": pod.live,
            "annotation": shown_annotation(pod.role.as_ref()), "path": path(&self.path),
            "pathKind": self.path_name(),
        });
        let answer = self.answer();
        shown["served"] = json!(answer.is_ok());
        let (Ok(answer) | Err(answer)) = answer;
        shown["answer"] = json!(answer);
        let counts = self.journal.counts;
        if let Some(last) = counts.last {
            shown["lastRequest"] = json!(time(last));
            shown["requests"] = json!(counts.requests);
            shown["requestsWithoutToken"] = json!(counts.without_token);
        }
        for (list, noted) in self.requests() {
            if !noted.is_empty() {
                shown[list] = noted.iter().map(requests::json).collect();
            }
        }
        if let Some(Exposed { until, age }) = self.exposed {
            shown["mayHoldNodeCredentialsUntil"] = json!(time(until));
            if age == Age::Unknown {
                shown["age"] = json!("unknown");
            }
        }
        if let Some(missing) = self.missing {
            shown["refused"] = json!(missing.to_string() + untrusted(missing));
            return shown;
        }
        match &self.decision {
            Decision::Refuse(refusal) => shown["refused"] = json!(refusal.to_string()),
            Decision::Allow(identity) => {
                shown["role"] = json!(identity.role.to_string());
                shown["sessionName"] = json!(identity.session_name.to_string());
                let policies: Vec<_> = identity.policies.iter().map(ToString::to_string).collect();
                if !policies.is_empty() {
                    shown["sessionPolicies"] = json!(policies);
                }
                shown["credentials"] = match &self.credentials {
                    None => json!("not wanted"),
                    Some(State::Pending(None)) => json!("pending"),
                    Some(State::Pending(Some(limit))) => json!({ "waiting": limit.to_string() }),
                    Some(State::Failed { error, .. }) => json!({ "failed": error.message }),
                    Some(State::Ready(issued)) => json!({
                        "accessKeyId": issued.credentials.access_key_id,
                        "expiration": time(issued.credentials.expires),
                    }),
                };
            }
        }
        shown
    }

    /// What `kiam-agent explain` prints.
    pub(super) fn text(&self) -> String {
        let pod = &self.pod;
        let mut lines = vec![("pod", self.who())];
        let annotation = match &pod.role {
            Some(annotation) => annotation.to_string(),
            None => "the pod has none".to_owned(),
        };
        lines.push(("annotation", annotation));
        match &self.role {
            None => {}
            Some(Ok(role)) => lines.push(("role", role.to_string())),
            Some(Err(error)) => lines.push(("role", error.to_string())),
        }
        lines.extend(self.namespace());
        if let Decision::Allow(identity) = &self.decision {
            let account = identity.service_account.as_ref();
            lines.extend(account.map(|account| ("vouched for", format!("by {account}'s token"))));
            lines.push(("session name", identity.session_name.to_string()));
            let source = identity.source_identity.as_ref();
            lines.extend(source.map(|source| ("source identity", source.to_string())));
            let tags = listed(identity.tags.iter().map(|(key, value)| format!("{key}={value}")));
            lines.extend(tags.map(|tags| ("session tags", tags)));
            let policies = listed(identity.policies.iter().map(ToString::to_string));
            lines.extend(policies.map(|policies| ("policies", policies)));
        }
        let is_set = if pod.external_id.is_some() { "set" } else { "not set" };
        lines.push(("external id", is_set.to_owned()));
        lines.push(("tokens", self.tokens().to_owned()));
        lines.push(("path", path(&self.path).to_owned()));
        if let Decision::Allow(_) = &self.decision {
            lines.push(("credentials", self.cached_credentials()));
        }
        if let Some(Exposed { until, age }) = self.exposed {
            let says = format!("{age} may hold the node's credentials until {}", time(until));
            lines.push(("older", says));
        }
        if self.settings.observes {
            let only = "observe: the pod's requests are left alone; they would be answered so:";
            lines.push(("mode", only.to_owned()));
        }
        let (Ok(answer) | Err(answer)) = self.answer();
        lines.push(("answer", answer));
        let counts = self.journal.counts;
        lines.extend(counts.last.map(|last| ("requests", requests::counted(&counts, last))));
        for (list, noted) in self.requests() {
            lines.extend(noted.iter().map(|noted| (list, requests::text(noted))));
        }
        lines.iter().fold(String::new(), |mut text, (what, says)| {
            // AWS's words may have any form; nothing fails when it is written to memory.
            let _ = writeln!(text, "{what:15} {}", says.replace(char::is_control, " "));
            text
        })
    }

    /// The first word of the path: `pod-local`, `node`, `denied` or `refused`.
    pub(super) fn path_name(&self) -> &str {
        let path = path(&self.path);
        path.split_once(':').map_or(path, |(name, _)| name)
    }

    /// The requests that the pod made, by outcome.
    fn requests(&self) -> [(&'static str, &[RecordedRequest]); 2] {
        [("rejected", &self.journal.refused), ("imdsv1", &self.journal.imdsv1)]
    }

    fn who(&self) -> String {
        let pod = &self.pod;
        let mut who = format!("{}/{}, uid {}", pod.namespace, pod.name, pod.uid);
        if let Some(node) = &pod.node {
            who += &format!(", on node {node}");
        }
        if pod.host_network {
            who += ", on the node's network";
        }
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        match addresses.as_slice() {
            [] => who += ", without address yet",
            some => who += &format!(", at {}", some.join(" ")),
        }
        if pod.live { who } else { who + ", ended" }
    }

    /// What the namespace's annotations say, each.
    fn namespace(&self) -> Vec<(&'static str, String)> {
        let name = &self.pod.namespace;
        let Some(namespace) = &self.namespace else {
            return vec![("namespace", format!("{name} is not known yet"))];
        };
        let raw = |annotation: &Option<Annotation>| match annotation {
            Some(annotation) => format!("says {annotation}"),
            None => "the namespace has none".to_owned(),
        };
        let (permitted, allowed_roles) = match &self.rulings {
            Some(Rulings { permitted, allowed_roles }) => {
                (ruling(permitted.as_ref()), ruling(allowed_roles.as_ref()))
            }
            None => (raw(&namespace.permitted), raw(&namespace.allowed_roles)),
        };
        vec![("permitted", permitted), ("allowed-roles", allowed_roles)]
    }

    fn tokens(&self) -> &'static str {
        match (&self.namespace, self.settings.imdsv2) {
            (_, Imdsv2::Required) => "required, by --imdsv2",
            (Some(namespace), _) if namespace.requires_imdsv2() => "required, by the namespace",
            (Some(_), _) => "optional",
            (None, _) => "required, as long as the namespace is not known",
        }
    }

    fn cached_credentials(&self) -> String {
        let whole =
            |left: Duration| humantime::format_duration(Duration::from_secs(left.as_secs()));
        match &self.credentials {
            None => "none: this agent does not want them (yet)".to_owned(),
            Some(State::Pending(None)) => "none yet: STS is asked".to_owned(),
            Some(State::Pending(Some(limit))) => format!("none yet: {limit}"),
            Some(State::Failed { error, retry_at }) => {
                let left = retry_at.saturating_duration_since(Instant::now());
                format!("none: {error}; STS is asked again in {}", whole(left))
            }
            Some(State::Ready(issued)) => {
                let held = &issued.credentials;
                let left = held.expires.duration_since(self.now).unwrap_or_default();
                let until = time(held.expires);
                format!("{}, valid until {until} ({})", held.access_key_id, whole(left))
            }
        }
    }

    /// What the pod would be answered now; `Ok` if that is credentials.
    pub(super) fn answer(&self) -> Result<String, String> {
        if !self.pod.live {
            return Err("none: the pod has ended".to_owned());
        }
        match self.grounds {
            Some(Grounds::NodeRole) => {
                return Err("the real metadata service's: --node-role names the pod".to_owned());
            }
            Some(Grounds::HostNetwork) => {
                return Err("the real metadata service's, by --host-network-pods=pass".to_owned());
            }
            None => {}
        }
        if let Err(path) = &self.path {
            return Err(format!("none, it can't connect: {path}"));
        }
        let refused = |error: &imds::Error| {
            let (role, credentials) =
                (error.status(PathKind::Elsewhere), error.status(PathKind::Credentials));
            if role == credentials {
                return format!("{}: {error}", role.as_u16());
            }
            format!(
                "{} for its role, {} for credentials: {error}",
                role.as_u16(),
                credentials.as_u16()
            )
        };
        if let Some(missing) = self.missing {
            return Err(refused(&imds::Error::Pod(missing)) + untrusted(missing));
        }
        match &self.decision {
            Decision::Refuse(refusal) => Err(refused(&imds::Error::Refused(refusal.clone()))),
            Decision::Allow(_) => match imds::ready(self.credentials.clone()) {
                Ok(_) => Ok("200, with these credentials".to_owned()),
                Err(error) => Err(refused(&error)),
            },
        }
    }
}

/// Why the agent does not know a static pod, if it doesn't.
fn untrusted(missing: NotFound) -> &'static str {
    if missing == NotFound::Unknown {
        ": it is a static pod, and --static-pod-namespaces does not name its namespace"
    } else {
        ""
    }
}

fn shown_annotation(annotation: Option<&Annotation>) -> Option<String> {
    annotation.map(|it| it.text().map_or_else(|too_long| too_long.to_string(), str::to_owned))
}

/// `None` where there is nothing to list.
fn listed(items: impl Iterator<Item = String>) -> Option<String> {
    let items: Vec<_> = items.collect();
    (!items.is_empty()).then(|| items.join(", "))
}

fn path(path: &Result<String, String>) -> &str {
    let (Ok(text) | Err(text)) = path;
    text
}

fn ruling<E: std::fmt::Display>(ruling: Option<&Ruling<E>>) -> String {
    match ruling {
        None => "the namespace has none".to_owned(),
        Some(Ruling::Allows(text)) => format!("allows the role by {text}"),
        Some(Ruling::Forbids(text)) => format!("forbids the role: {text} does not match it"),
        Some(Ruling::Invalid(error)) => format!("forbids every role: {error}"),
    }
}

pub(super) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
