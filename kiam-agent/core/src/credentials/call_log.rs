//! The log lines of calls to STS.

use std::time::Duration;

use tracing::{info, warn};

use super::{Credentials, Names, SourceError};
use crate::role::{Claimant, RoleIdentity};

/// A call, as the log names it: with the pod that it was made for. Other pods may share its result.
pub(super) struct CallLog<'a> {
    identity: &'a RoleIdentity,
    claimant: &'a Claimant,
    name: Option<String>,
}

// === impl CallLog ===

impl<'a> CallLog<'a> {
    pub(super) fn new(identity: &'a RoleIdentity, claimant: &'a Claimant, names: &Names) -> Self {
        Self { identity, claimant, name: names(claimant) }
    }

    pub(super) fn issued(&self, credentials: &Credentials) {
        info!(
            pod.name = self.name, pod.namespace = &*self.claimant.namespace, pod.uid = &*self.claimant.pod,
            pod.iam.role = %self.identity.role,
            credentials.access.key = %credentials.access_key_id,
            credentials.expiration = %humantime::format_rfc3339_seconds(credentials.expires),
            "Issued credentials"
        );
    }

    pub(super) fn failed(&self, error: &SourceError, wait: Duration) {
        warn!(
            pod.name = self.name, pod.namespace = &*self.claimant.namespace, pod.uid = &*self.claimant.pod,
            pod.iam.role = %self.identity.role, %error, retry_in = ?wait, "Credentials not issued"
        );
    }
}
