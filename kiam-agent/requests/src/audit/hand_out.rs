//! One hand-out of credentials, with what is known of it when the answer is made. It has no secret.

use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use serde::Serialize;

use super::Requested;
use kiam_core::{
    credentials::IssuedCredentials,
    pods::{CallingProcess, Client, Inspection, Opener, Origin, Pod},
    role::{RoleArn, SessionName},
};

/// The most bytes of a `User-Agent` that are kept.
const MAX_USER_AGENT: usize = 128;

/// A hand-out of credentials.
#[derive(Debug)]
pub(super) struct HandOut {
    pub(super) time: SystemTime,
    pub(super) pod: Arc<Pod>,
    pub(super) opener: Option<Arc<Opener>>,
    pub(super) access_key_id: Box<str>,
    pub(super) role: RoleArn,
    pub(super) session_name: SessionName,
    pub(super) expires: SystemTime,
    pub(super) path: Path,
    pub(super) has_token: bool,
    /// Escaped.
    pub(super) user_agent: Option<String>,
    /// Why the hand-out is unusual.
    pub(super) unusual: OnceLock<Vec<super::unusual::Reason>>,
}

/// How the connection came to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Path {
    /// To a listener inside the pod's network namespace.
    PodLocal,
    /// To the node listener, from a pod's network namespace.
    Node,
    /// To the node listener, from the node's network namespace.
    HostNetwork,
    /// Only the source address is known (`--identity=source-ip`).
    SourceIp,
}

// === impl HandOut ===

impl HandOut {
    pub(super) fn new(
        client: &Client,
        pod: Arc<Pod>,
        issued: &IssuedCredentials,
        requested: Requested<'_>,
        time: SystemTime,
    ) -> Self {
        let credentials = &issued.credentials;
        let user_agent = requested.user_agent.map(|value| {
            let value = value.as_bytes();
            escaped(&value[..value.len().min(MAX_USER_AGENT)], MAX_USER_AGENT)
        });
        Self {
            time,
            pod,
            opener: client.opener().cloned(),
            access_key_id: credentials.access_key_id.as_str().into(),
            role: credentials.role.clone(),
            session_name: issued.session_name.clone(),
            expires: credentials.expires,
            path: Path::of(client),
            has_token: requested.has_token,
            user_agent,
            unusual: OnceLock::new(),
        }
    }

    /// The cookie of the connection's socket; 0 if the kernel does not attest it.
    pub(super) fn socket(&self) -> u64 {
        self.opener.as_ref().map_or(0, |opener| opener.socket)
    }

    /// The process that connected, if it is known.
    pub(super) fn process(&self) -> Option<&CallingProcess> {
        self.opener.as_ref()?.process.as_ref()
    }

    /// What `/proc` said of the process, once it was read.
    pub(super) fn inspection(&self) -> Option<&Inspection> {
        self.opener.as_ref()?.inspection.get()
    }

    /// Whether `other` gave the same key to the same process, by another connection or the same.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let of = |it: &Self| it.process().map(|process| (process.pid, process.comm));
        let container = |it: &Self| it.opener.as_ref().and_then(|it| it.container.clone());
        self.access_key_id == other.access_key_id
            && of(self) == of(other)
            && container(self) == container(other)
    }
}

// === impl Path ===

impl Path {
    fn of(client: &Client) -> Self {
        match client {
            Client::PodListener { .. } => Self::PodLocal,
            Client::Pod { origin: Origin::Node, .. } => Self::HostNetwork,
            Client::Pod { .. } => Self::Node,
            Client::Address(_) => Self::SourceIp,
        }
    }
}

/// `bytes` in printable ASCII, as Rust escapes them, and at most `most` characters of that.
pub(super) fn escaped(bytes: &[u8], most: usize) -> String {
    let mut shown = bytes.escape_ascii().to_string();
    if shown.len() > most {
        shown.truncate(most.saturating_sub(3));
        shown.push_str("...");
    }
    shown
}
