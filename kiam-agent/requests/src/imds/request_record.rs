//! The log line of a request, which names the pod also for a rejected request.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{StatusCode, header, request};
use tokio::time::Instant;
use tracing::{Level, debug, enabled, info, warn};

use super::{Error, ServiceParts, activity::Answered};
use crate::audit::{Audit, Requested};
use kiam_core::{
    credentials::IssuedCredentials,
    pods::{Client, Pod, PodReader, PodUid, Unattested},
    role::{QuotedText, RoleIdentity},
};

/// The facts about a request that its log line and the journal show.
pub(super) struct RequestRecord {
    pub(super) began: Instant,
    pub(super) at: SystemTime,
    pub(super) pod: Option<Arc<Pod>>,
    pub(super) identity: Option<Arc<RoleIdentity>>,
    pub(super) issued: Option<Arc<IssuedCredentials>>,
    /// Whether the request was accepted without a session token.
    pub(super) without_token: bool,
}

/// The pod of `client`, if it is known, also for a rejected request.
fn pod_of(client: &Result<Client, Unattested>, pods: &PodReader) -> Option<Arc<Pod>> {
    match uid_of(client) {
        Some(uid) => pods.by_uid(uid).ok(),
        None => pods.find(client.as_ref().ok()?).ok(),
    }
}

/// The pod's UID that the kernel attests.
fn uid_of(client: &Result<Client, Unattested>) -> Option<&PodUid> {
    match client {
        Ok(client) | Err(Unattested::Unknown { client, .. }) => match client {
            Client::Pod { uid, .. } | Client::PodListener { uid, .. } => Some(uid),
            Client::Address(_) => None,
        },
        Err(Unattested::OtherPod { caller, .. }) => Some(caller),
        Err(_) => None,
    }
}

// === impl RequestRecord ===

impl RequestRecord {
    /// The record of a request that `began` then, `at` this time of the day.
    pub(super) fn new(began: Instant, at: SystemTime) -> Self {
        Self { began, at, pod: None, identity: None, issued: None, without_token: false }
    }

    /// Looks up the pod if the request is to be recorded, and adds it to the journal: rejected, or as a count.
    pub(super) fn note(
        &mut self,
        client: &Result<Client, Unattested>,
        head: &request::Parts,
        refusal: Option<&Error>,
        parts: &ServiceParts,
    ) {
        if self.pod.is_none() && (refusal.is_some() || enabled!(Level::DEBUG)) {
            self.pod = pod_of(client, &parts.pods);
        }
        let Some(pod) = &self.pod else { return };
        if let Some(error) = refusal {
            parts.journal.refused(&pod.uid, head, error.kind(), self.at);
        }
        let answered =
            Answered { credentials: self.issued.is_some(), without_token: self.without_token };
        parts.journal.answered(&pod.uid, answered, self.at);
    }

    /// Records the credentials that are handed out, with the client's process.
    pub(super) fn audit(
        &self,
        client: &Result<Client, Unattested>,
        head: &request::Parts,
        audit: &Audit,
    ) {
        if let (Ok(client), Some(pod), Some(issued)) = (client, &self.pod, &self.issued) {
            let user_agent = head.headers.get(header::USER_AGENT);
            let requested = Requested { has_token: !self.without_token, user_agent };
            audit.handed_out(client, pod, issued, requested);
        }
    }

    /// Logs one line: above `debug` only if `admitted`, which is the number of equal lines dropped before.
    pub(super) fn log(
        &self,
        client: &Result<Client, Unattested>,
        head: &request::Parts,
        status: StatusCode,
        (refusal, took): (Option<&Error>, Duration),
        admitted: Option<u64>,
    ) {
        let pod = self.pod.as_deref();
        let (name, namespace) = (pod.map(|pod| &*pod.name), pod.map(|pod| &*pod.namespace));
        let uid = uid_of(client).map(tracing::field::display);
        let ip = match client {
            Ok(client) | Err(Unattested::Unknown { client, .. }) => match client {
                Client::Pod { address, .. } | Client::Address(address) => Some(address),
                Client::PodListener { .. } => None,
            },
            Err(_) => None,
        }
        .map(tracing::field::display);
        let role = self.identity.as_ref().map(|identity| tracing::field::display(&identity.role));
        let (method, path, status) = (&head.method, head.uri.path(), status.as_u16());
        let reason = refusal.map(tracing::field::display);
        match (refusal, &self.issued, admitted) {
            (Some(_), _, Some(left_out)) => warn!(
                pod.name = name, pod.namespace = namespace, pod.uid = uid, pod.ip = ip, pod.iam.role = role,
                req.method = %method, req.path = ?QuotedText::new(path), res.status = status, duration = ?took,
                reason, left_out, "Rejected request"
            ),
            (None, Some(issued), Some(left_out)) => info!(
                pod.name = name, pod.namespace = namespace, pod.uid = uid, pod.ip = ip, pod.iam.role = role,
                credentials.access.key = &*issued.credentials.access_key_id,
                req.method = %method, req.path = ?QuotedText::new(path), res.status = status, duration = ?took,
                left_out, "Processed request"
            ),
            _ => debug!(
                pod.name = name, pod.namespace = namespace, pod.uid = uid, pod.ip = ip, pod.iam.role = role,
                req.method = %method, req.path = ?QuotedText::new(path), res.status = status, duration = ?took,
                reason, "Processed request"
            ),
        }
    }
}
