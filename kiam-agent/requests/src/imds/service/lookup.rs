//! The current decision about a request's pod, which is waited for where a record may be on its way.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::{
    super::{Error, checks::ImdsVersion, request_record::RequestRecord, session::Session},
    Service,
};
use kiam_core::{
    pods::{Client, Namespace},
    policy::{Decision, Standing},
    role::RoleIdentity,
};

/// Whom a request is for, whether it has a token, and until when it may wait.
pub(super) struct Lookup<'a> {
    pub(super) client: &'a Client,
    /// The memory of the client's connection; `None` where the request is for somebody else.
    pub(super) session: Option<&'a Session>,
    pub(super) version: ImdsVersion,
    pub(super) deadline: Instant,
}

// === impl Service ===

impl Service {
    /// The current decision about the pod. Waits for an unknown pod.
    pub(super) async fn standing(
        &self,
        lookup: &Lookup<'_>,
        record: &mut RequestRecord,
    ) -> Result<Arc<Standing>, Error> {
        // Only what the request finds at once is as old as the request: once it has waited, it looks again.
        let session = lookup.session.filter(|_| record.pod.is_none());
        let revision = self.parts.pods.revision();
        let known = session.and_then(|session| session.standing(revision, record.began));
        if let Some((pod, standing)) = known {
            record.pod = Some(pod);
            return Ok(standing);
        }
        let (pod, session) = match self.parts.pods.find(lookup.client) {
            Ok(pod) => (pod, session),
            Err(_) => (self.parts.pods.wait(lookup.client, lookup.left()).await?, None),
        };
        let standing = self.parts.policy.standing(&pod);
        if let Some(session) = session {
            session.remember((&pod, &standing), revision, record.began);
        }
        record.pod = Some(pod);
        Ok(standing)
    }

    /// The current decision about the pod, if the request may have no token. Without one it waits for an unknown namespace,
    /// which may require tokens.
    pub(super) async fn authorised(
        &self,
        lookup: &Lookup<'_>,
        record: &mut RequestRecord,
    ) -> Result<Arc<Standing>, Error> {
        let mut standing = self.standing(lookup, record).await?;
        if lookup.version == ImdsVersion::V1 && standing.namespace().is_none() {
            let known = |standing: &Standing| standing.namespace().is_some();
            standing = self.standing_when(known, lookup, record).await?;
        }
        lookup.permitted(&standing)?;
        Ok(standing)
    }

    /// The decision about the pod once `settled` says that it need not be waited for, or else the last one in time.
    pub(super) async fn standing_when(
        &self,
        settled: impl Fn(&Standing) -> bool,
        lookup: &Lookup<'_>,
        record: &mut RequestRecord,
    ) -> Result<Arc<Standing>, Error> {
        let mut changes = self.parts.pods.changes();
        loop {
            let standing = self.standing(lookup, record).await?;
            if settled(&standing)
                || !matches!(timeout_at(lookup.deadline, changes.changed()).await, Ok(Ok(())))
            {
                return Ok(standing);
            }
        }
    }

    /// The identity that the pod is allowed. Waits for an unknown namespace or ServiceAccount.
    pub(super) async fn identity(
        &self,
        lookup: &Lookup<'_>,
        mut standing: Arc<Standing>,
        record: &mut RequestRecord,
    ) -> Result<Arc<RoleIdentity>, Error> {
        let passes = |standing: &Standing| match standing.decision() {
            Decision::Allow(_) => false,
            Decision::Refuse(refusal) => refusal.may_pass(),
        };
        if passes(&standing) {
            standing = self.standing_when(|it| !passes(it), lookup, record).await?;
            lookup.permitted(&standing)?;
        }
        match standing.decision() {
            Decision::Allow(identity) => {
                record.identity = Some(identity.clone());
                Ok(identity.clone())
            }
            Decision::Refuse(refusal) => Err(Error::Refused(refusal.clone())),
        }
    }
}

// === impl Lookup ===

impl Lookup<'_> {
    /// Rejects a request without a token if the pod's namespace requires one. One that stays unknown may do so.
    fn permitted(&self, standing: &Standing) -> Result<(), Error> {
        let is_required = || standing.namespace().is_none_or(Namespace::requires_imdsv2);
        if self.version == ImdsVersion::V1 && is_required() {
            return Err(Error::TokenMissing);
        }
        Ok(())
    }

    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}
