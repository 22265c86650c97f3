//! Answers pods' requests.
//!
//! Who is calling was resolved when the connection was accepted; whether it may have what it asks for is
//! decided for every request from the records as they are then. Nothing here asks STS.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, request};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use super::{
    AllowPath, DenyPath, Error, ErrorKind, Journal, Metrics, NodeRole, PathKind, TokenAuthority,
    Upstream,
    checks::{self, ImdsVersion},
    first_requests::{FirstRequestOutcome, FirstRequests, ready},
    host::Hosts,
    metrics::RequestKind,
    request_record::RequestRecord,
    response::{self, Answer},
    roles::other_role,
    route::{Form, Readable, RequestedRole, Route, Routes},
    version1::Version1,
    wire,
};
use crate::serve::{Owner, PodService, Relay};
use kiam_core::{
    clock::Clock,
    credentials::{CredentialReader, IssuedCredentials, State},
    pods::{Client, NotFound, Pod, PodReader, PodUid, Unattested},
    policy::{Decision, RolePolicy},
    role::RoleIdentity,
    telemetry::LogLimit,
};

/// How often the same refusal of the same pod, or its answers, are logged above `debug`.
const LOG_PERIOD: Duration = Duration::from_secs(1);
/// How often it is logged that a pod is passed on.
const RELAY_LOG_PERIOD: Duration = Duration::from_secs(24 * 3600);

/// What the metadata service is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long a request may wait for its pod and the pod's credentials, together.
    pub hold: Duration,
    /// Whether requests need a token.
    pub imdsv2: Imdsv2,
    /// What pods may read of the real service beyond the paths that are open by default.
    pub allow_paths: Vec<AllowPath>,
    /// What they may not read in any case.
    pub deny_paths: Vec<DenyPath>,
    /// Whether `?ip=` names the pod: for trying the agent, and never with the interceptor.
    pub allow_ip_query: bool,
    /// Pods that are passed on to the real service.
    pub node_roles: Vec<NodeRole>,
    /// The agent's own addresses, which `Host` may name in source-ip mode. Empty in kernel mode: who
    /// names them there was not redirected (a port-forward, or a request that was forged).
    pub own_addresses: Vec<IpAddr>,
}

/// Whether requests need a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Imdsv2 {
    /// A token that is there must be good.
    Optional,
    /// Without one a request is refused.
    Required,
}

/// What the service asks.
pub struct ServiceParts {
    /// Which pod?
    pub pods: PodReader,
    /// May it?
    pub policy: RolePolicy,
    /// What it gets.
    pub credentials: CredentialReader,
    /// Issues and verifies IMDSv2 tokens.
    pub tokens: TokenAuthority,
    /// The real service.
    pub upstream: Upstream,
    /// Tells the time.
    pub clock: Clock,
    /// Counts.
    pub metrics: Metrics,
    /// Remembers what was refused, and who asks without a token.
    pub journal: Journal,
}

/// The instance metadata service, as pods see it.
pub struct Service {
    config: Config,
    routes: Routes,
    hosts: Hosts,
    parts: ServiceParts,
    version1: Version1,
    first: FirstRequests,
    log: LogLimit<(Option<ErrorKind>, Owner)>,
    relayed: LogLimit<PodUid>,
}

// === impl Service ===

impl PodService for Service {
    async fn relay(&self, client: &Client) -> Result<Option<Relay>, NotFound> {
        // Who has only an address may be another pod by now.
        if self.config.node_roles.is_empty() || matches!(client, Client::Address(_)) {
            return Ok(None);
        }
        let pod = self.parts.pods.wait(client, self.config.hold).await?;
        if !self.config.node_roles.iter().any(|role| role.names(&pod)) {
            return Ok(None);
        }
        if self.relayed.admit(pod.uid.clone()).is_some() {
            info!(
                pod.name = pod.name,
                pod.namespace = pod.namespace,
                service_account = pod.service_account,
                "Connections are passed on to the real metadata service (--node-role)"
            );
        }
        Ok(Some(self.parts.upstream.relay()))
    }

    async fn call(
        &self,
        client: Arc<Result<Client, Unattested>>,
        request: Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        let began = Instant::now();
        let (head, body) = request.into_parts();
        let route = self.routes.parse(&head.method, head.uri.path());
        let asked = RequestKind::of(&route);
        let kind = match &route {
            Ok(Route::Read(Readable::Credentials(..))) => PathKind::Credentials,
            _ => PathKind::Elsewhere,
        };
        let mut record = RequestRecord::default();
        let outcome = self.answer(&client, &head, body, route, &mut record).await;
        let response = match &outcome {
            Ok(answer) => answer.response(),
            Err(error) => response::refusal(error, kind),
        };
        let refusal = outcome.as_ref().err();
        let took = began.elapsed();
        self.parts.metrics.answered(asked, response.status(), refusal, took);
        let kind = (refusal.map(Error::kind), Owner::of(&client));
        let speaks = refusal.is_some() || record.issued.is_some();
        let admitted = speaks.then(|| self.log.admit(kind)).flatten();
        record.note(&client, &head, refusal, &self.parts);
        record.log(&client, &head, response.status(), (refusal, took), admitted);
        response
    }

    fn pod(&self, client: &Client) -> Option<Arc<Pod>> {
        self.parts.pods.find(client).ok()
    }
}

impl Service {
    /// A service over `parts`.
    #[must_use]
    pub fn new(config: Config, parts: ServiceParts) -> Self {
        let routes = Routes::new(config.allow_paths.clone(), config.deny_paths.clone());
        let hosts = Hosts::new(config.own_addresses.clone());
        Self {
            config,
            routes,
            hosts,
            parts,
            version1: Version1::default(),
            first: FirstRequests::default(),
            log: LogLimit::new(LOG_PERIOD),
            relayed: LogLimit::new(RELAY_LOG_PERIOD),
        }
    }

    /// Checks a request in the order of how little it takes to be refused: who, how, and only then what.
    async fn answer(
        &self,
        client: &Result<Client, Unattested>,
        head: &request::Parts,
        body: Incoming,
        route: Result<Route, Error>,
        record: &mut RequestRecord,
    ) -> Result<Answer, Error> {
        let (client, unknown) = match client {
            Ok(client) => (client, None),
            Err(Unattested::Unknown { client, not_found }) => (client, Some(*not_found)),
            Err(error) => return Err(Error::Unattested(error.clone())),
        };
        checks::direct(&head.headers)?;
        self.hosts.check(head.version, &head.uri, &head.headers)?;
        if [Method::GET, Method::HEAD, Method::PUT].contains(&head.method) {
            checks::no_body(&head.method, body).await?;
        }
        let mut version = ImdsVersion::V2;
        let reads = [Method::GET, Method::HEAD].contains(&head.method);
        // Nothing is read where the path has not even the method.
        if reads && !matches!(route, Err(Error::Method { .. })) {
            let (tokens, imdsv2) = (&self.parts.tokens, self.config.imdsv2);
            version = checks::token(&head.headers, client, tokens, imdsv2)?;
        }
        match (route?, unknown) {
            (Route::Token, _) => self.token(client, head),
            // It was waited for, and may be a pod that is passed on.
            (Route::Read(_), Some(not_found)) => Err(not_found.into()),
            (Route::Read(what), None) => {
                let caller = self.caller(client, head)?;
                let deadline = Instant::now() + self.config.hold;
                if version == ImdsVersion::V1 {
                    self.without_token(&caller, head, deadline, record).await?;
                }
                let body = self.read(&caller, what, deadline, record).await?;
                Ok(Answer { body, ttl: None })
            }
        }
    }

    /// Refuses a request without token where the pod's namespace wants one, and notes it elsewhere. A
    /// namespace that is not known yet is waited for; one that stays unknown may want tokens.
    async fn without_token(
        &self,
        client: &Client,
        head: &request::Parts,
        deadline: Instant,
        record: &mut RequestRecord,
    ) -> Result<(), Error> {
        let mut changes = self.parts.pods.changes();
        loop {
            let pod = self.pod(client, deadline, record).await?;
            match self.parts.pods.namespace(&pod.namespace) {
                Some(namespace) if namespace.requires_imdsv2() => return Err(Error::TokenMissing),
                Some(_) => {
                    self.parts.metrics.imdsv1();
                    self.version1.log(&pod, &head.headers);
                    self.parts.journal.imdsv1(&pod.uid, head, self.parts.clock.now());
                    return Ok(());
                }
                None if !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) => {
                    return Err(Error::TokenMissing);
                }
                None => {}
            }
        }
    }

    /// A token. Local and at once: a failure here makes SDKs fall back to IMDSv1 and stay there.
    fn token(&self, client: &Client, head: &request::Parts) -> Result<Answer, Error> {
        let ttl = checks::ttl(&head.headers)?;
        let body = self.parts.tokens.issue(client, ttl).into();
        Ok(Answer { body, ttl: Some(ttl) })
    }

    /// Who is looked up: the client, or the address that it names where that is allowed.
    fn caller(&self, client: &Client, head: &request::Parts) -> Result<Client, Error> {
        let queried = match head.uri.query() {
            Some(query) if self.config.allow_ip_query => checks::queried(query)?,
            _ => None,
        };
        Ok(queried.map_or_else(|| client.clone(), Client::Address))
    }

    async fn read(
        &self,
        client: &Client,
        what: Readable,
        deadline: Instant,
        record: &mut RequestRecord,
    ) -> Result<Bytes, Error> {
        let body = match what {
            Readable::RoleName => {
                let issued = self.issued(client, None, deadline, record).await?;
                Bytes::copy_from_slice(issued.credentials.role.name().as_bytes())
            }
            Readable::Credentials(form, role) => {
                let issued = self.issued(client, Some(&role), deadline, record).await?;
                match form {
                    Form::Plain => issued.rendered.plain.clone(),
                    Form::Extended => issued.rendered.extended.clone(),
                }
            }
            Readable::InstanceProfile => {
                let identity = self.identity(client, deadline, record).await?;
                wire::instance_profile(&identity.role, self.parts.clock.now())
            }
            Readable::Listing(body) => {
                self.pod(client, deadline, record).await?;
                Bytes::from_static(body.as_bytes())
            }
            Readable::Upstream(path) => {
                let pod = self.pod(client, deadline, record).await?;
                self.parts.upstream.get(&path, &pod.uid).await?
            }
        };
        Ok(body)
    }

    /// The pod that `client` is; one that is not known yet is waited for.
    async fn pod(
        &self,
        client: &Client,
        deadline: Instant,
        record: &mut RequestRecord,
    ) -> Result<Arc<Pod>, Error> {
        let hold = deadline.saturating_duration_since(Instant::now());
        let pod = self.parts.pods.wait(client, hold).await?;
        record.pod = Some(pod.clone());
        Ok(pod)
    }

    /// What the pod is allowed; a namespace or ServiceAccount that is not known yet is waited for.
    async fn identity(
        &self,
        client: &Client,
        deadline: Instant,
        record: &mut RequestRecord,
    ) -> Result<RoleIdentity, Error> {
        let mut changes = self.parts.pods.changes();
        loop {
            let pod = self.pod(client, deadline, record).await?;
            let refusal = match self.parts.policy.decide(&pod) {
                Decision::Allow(identity) => {
                    record.role = Some(identity.role.clone());
                    return Ok(identity);
                }
                Decision::Refuse(refusal) => refusal,
            };
            if !refusal.may_pass()
                || !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(())))
            {
                return Err(Error::Refused(refusal));
            }
        }
    }

    fn count_first(&self, record: &RequestRecord, waited: bool, ready: bool) {
        let Some(pod) = &record.pod else { return };
        if self.first.is_first(&pod.uid, &self.parts.pods) {
            self.parts.metrics.first_request(FirstRequestOutcome::of(waited, ready));
        }
    }

    /// The pod's credentials, if it asks for its own role's; those that are pending are waited for.
    async fn issued(
        &self,
        client: &Client,
        requested: Option<&RequestedRole>,
        deadline: Instant,
        record: &mut RequestRecord,
    ) -> Result<Arc<IssuedCredentials>, Error> {
        let mut identity = self.identity(client, deadline, record).await?;
        loop {
            if let Some(requested) = requested.filter(|requested| !requested.names(&identity.role))
            {
                return Err(other_role(requested, record.pod.as_deref(), &self.parts));
            }
            let mut state = self.parts.credentials.get(&identity);
            let waited = !matches!(state, Some(State::Ready(_)));
            if waited {
                let hold = deadline.saturating_duration_since(Instant::now());
                state = self.parts.credentials.wait(&identity, hold).await;
            }
            let issued = ready(state);
            self.count_first(record, waited, issued.is_ok());
            let issued = issued?;
            // While this waited, the pod may have gone, or its role been changed or forbidden.
            if waited {
                let now = self.identity(client, deadline, record).await?;
                if now != identity {
                    identity = now;
                    continue;
                }
            }
            record.issued = Some(issued.clone());
            return Ok(issued);
        }
    }
}

#[cfg(test)]
pub(super) mod fixture;
#[cfg(test)]
mod spellings;
#[cfg(test)]
mod tests;
