//! Credentials, their sources and prefetchers made up, for tests.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::{
    CredentialSource, Credentials, Metrics, PrefetcherParts, RenderedAnswers, SourceError,
};
use crate::{
    clock::Clock,
    lifecycle::Readiness,
    role::{Claimant, RoleArn, RoleIdentity, WantedRoles},
    secret::Secret,
    telemetry::Statsd,
};

/// A source that answers by a function.
#[derive(Debug)]
pub struct FnSource<F>(pub F);

impl<F, A> CredentialSource for FnSource<F>
where
    F: Fn(&RoleIdentity) -> A + Send + Sync + 'static,
    A: Future<Output = Result<Credentials, SourceError>> + Send + 'static,
{
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        _claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>> {
        Box::pin((self.0)(identity))
    }
}

impl Credentials {
    /// Those of a role, with this access key.
    pub fn test(role: &RoleArn, key: &str, issued: SystemTime, life: Duration) -> Self {
        Self {
            role: role.clone(),
            access_key_id: key.to_owned(),
            secret_access_key: Secret::new("secret"),
            session_token: Secret::new("token"),
            issued,
            expires: issued + life,
        }
    }
}

impl PrefetcherParts {
    /// Those of a prefetcher that always knows what is wanted, and whose answers are empty.
    pub fn test(
        source: impl CredentialSource,
        clock: Clock,
        wanted: watch::Receiver<WantedRoles>,
    ) -> Self {
        Self {
            source: Arc::new(source),
            render: |_| RenderedAnswers {
                role_name: Bytes::new(),
                plain: Bytes::new(),
                extended: Bytes::new(),
            },
            clock,
            wanted,
            silence: Box::new(|| Some(Duration::ZERO)),
            names: Box::new(|_| None),
            metrics: Metrics::register(&mut Registry::default(), Statsd::off()),
            first_pass: Readiness::default().latch("first credentials"),
        }
    }
}
