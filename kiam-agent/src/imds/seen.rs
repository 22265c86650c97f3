//! The log line of a request.

use std::{sync::Arc, time::Duration};

use http::{StatusCode, request};
use tracing::{debug, info, warn};

use super::Error;
use crate::{
    credentials::Issued,
    pods::{Client, Pod, Unattested},
    role::{Quoted, RoleArn},
};

/// What was found out about a request on the way, for its log line.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) pod: Option<Arc<Pod>>,
    pub(super) role: Option<RoleArn>,
    pub(super) issued: Option<Arc<Issued>>,
}

// === impl Seen ===

impl Seen {
    /// One line; above `debug` only if it was `admitted`, with the number of those like it that were not.
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
        let ip = match client {
            Ok(Client::Pod { address, .. } | Client::Address(address)) => Some(address),
            Ok(Client::Inside { .. }) | Err(_) => None,
        }
        .map(tracing::field::display);
        let role = self.role.as_ref().map(tracing::field::display);
        let (method, path, status) = (&head.method, head.uri.path(), status.as_u16());
        let reason = refusal.map(tracing::field::display);
        match (refusal, &self.issued, admitted) {
            (Some(_), _, Some(left_out)) => warn!(
                pod.name = name, pod.namespace = namespace, pod.ip = ip, pod.iam.role = role,
                req.method = %method, req.path = ?Quoted::new(path), res.status = status, duration = ?took,
                reason, left_out, "Refused request"
            ),
            (None, Some(issued), Some(left_out)) => info!(
                pod.name = name, pod.namespace = namespace, pod.ip = ip, pod.iam.role = role,
                credentials.access.key = &*issued.credentials.access_key_id,
                req.method = %method, req.path = ?Quoted::new(path), res.status = status, duration = ?took,
                left_out, "Processed request"
            ),
            _ => debug!(
                pod.name = name, pod.namespace = namespace, pod.ip = ip, pod.iam.role = role,
                req.method = %method, req.path = ?Quoted::new(path), res.status = status, duration = ?took,
                reason, "Processed request"
            ),
        }
    }
}
