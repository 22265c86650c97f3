//! Answers pods' requests.
//!
//! The caller was resolved when the connection was accepted. Whether it may have what it requests is decided for every
//! request, from the current records. Nothing here calls STS.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, request};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::Instant;
use tracing::info;

use self::lookup::Lookup;
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
    session::Session,
    version1::{self, Version1},
    wire,
};
use crate::{
    audit::Audit,
    serve::{Owner, PodService, Relay},
};
use kiam_core::{
    clock::Clock,
    credentials::{CredentialReader, IssuedCredentials, State},
    pods::{Client, NotFound, Pod, PodReader, PodUid, Unattested},
    policy::{RolePolicy, Standing},
    telemetry::LogLimit,
};

/// The shortest time between log lines above `debug` about equal answers to one pod.
const LOG_PERIOD: Duration = Duration::from_secs(1);
/// The shortest time between log lines about a pod whose connections are passed on.
const RELAY_LOG_PERIOD: Duration = Duration::from_secs(24 * 3600);

/// The metadata service's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The longest wait of a request for its pod and the pod's credentials, together.
    pub hold: Duration,
    /// Whether requests need a token.
    pub imdsv2: Imdsv2,
    /// The paths of the real service that pods may read beside the open ones.
    pub allow_paths: Vec<AllowPath>,
    /// The paths that pods may not read in any case.
    pub deny_paths: Vec<DenyPath>,
    /// Whether `?ip=` names the pod. For trying the agent, and never with the interception.
    pub allow_ip_query: bool,
    /// The pods whose connections are passed on to the real service.
    pub node_roles: Vec<NodeRole>,
    /// The agent's own addresses, which `Host` may name in source-ip mode. Empty in kernel mode, where a client that names
    /// them was not redirected (a port-forward, or a forged request).
    pub own_addresses: Vec<IpAddr>,
}

/// Whether requests need a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Imdsv2 {
    /// A given token must be valid.
    Optional,
    /// A request without a token is rejected.
    Required,
}

/// The service's dependencies.
pub struct ServiceParts {
    /// The records of pods.
    pub pods: PodReader,
    /// The policy.
    pub policy: RolePolicy,
    /// The cached credentials.
    pub credentials: CredentialReader,
    /// The issuer of IMDSv2 tokens.
    pub tokens: TokenAuthority,
    /// The real service.
    pub upstream: Upstream,
    /// The wall clock.
    pub clock: Clock,
    /// The service's metrics.
    pub metrics: Metrics,
    /// The journal of rejected requests, and of requests without a token.
    pub journal: Journal,
    /// The audit of credentials.
    pub audit: Audit,
}

/// A request without its body, and the connection that it came on.
struct Asking<'a> {
    client: &'a Result<Client, Unattested>,
    head: &'a request::Parts,
    session: &'a Session,
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
    type Session = Session;

    async fn relay(&self, client: &Client) -> Result<Option<Relay>, NotFound> {
        self.parts.audit.connected(client);
        // An address may belong to another pod by now.
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
        client: &Result<Client, Unattested>,
        session: &Session,
        request: Request<Incoming>,
        began: Instant,
    ) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let route = self.routes.parse(&head.method, head.uri.path());
        let asked = RequestKind::of(&route);
        let kind = match &route {
            Ok(Route::Read(Readable::Credentials(..))) => PathKind::Credentials,
            _ => PathKind::Elsewhere,
        };
        let mut record = RequestRecord::new(began, self.parts.clock.now());
        let asking = Asking { client, head: &head, session };
        let outcome = self.answer(&asking, body, route, &mut record).await;
        if kind == PathKind::Credentials && head.method == Method::GET && outcome.is_ok() {
            record.audit(client, &head, &self.parts.audit);
        }
        let response = match &outcome {
            Ok(answer) => answer.response(),
            Err(error) => response::refusal(error, kind),
        };
        let refusal = outcome.as_ref().err();
        let took = began.elapsed();
        self.parts.metrics.answered(asked, response.status(), refusal, took);
        let speaks = refusal.is_some() || record.issued.is_some();
        let kind = || (refusal.map(Error::kind), Owner::of(client));
        let admitted = speaks.then(|| self.log.admit_at(kind(), began)).flatten();
        record.note(client, &head, refusal, &self.parts);
        record.log(client, &head, response.status(), (refusal, took), admitted);
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

    /// Answers a request, with the cheapest checks first: the caller, the form, and only then the path.
    async fn answer(
        &self,
        asking: &Asking<'_>,
        body: Incoming,
        route: Result<Route, Error>,
        record: &mut RequestRecord,
    ) -> Result<Answer, Error> {
        let Asking { head, session, .. } = *asking;
        let (client, unknown) = match asking.client {
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
        // A wrong method is rejected without a token check.
        if reads && !matches!(route, Err(Error::Method { .. })) {
            let tokens = (&self.parts.tokens, &session.token);
            version = checks::token(&head.headers, client, tokens, self.config.imdsv2)?;
        }
        match (route?, unknown) {
            (Route::Token, _) => self.token(client, head),
            // The pod stayed unknown, and its connection may be one to pass on.
            (Route::Read(_), Some(not_found)) => Err(not_found.into()),
            (Route::Read(what), None) => {
                let queried = self.queried(head)?;
                let lookup = Lookup {
                    client: queried.as_ref().unwrap_or(client),
                    session: queried.is_none().then_some(session),
                    version,
                    deadline: record.began + self.config.hold,
                };
                let standing = self.authorised(&lookup, record).await?;
                if version == ImdsVersion::V1 {
                    // Before the wait, as a client may give up.
                    self.without_token(head, session, record);
                }
                let body = self.read(&lookup, standing, what, record).await?;
                Ok(Answer { body, ttl: None })
            }
        }
    }

    /// Records a request without a token, which was accepted as such, also if a token comes to be required while it waits.
    fn without_token(&self, head: &request::Parts, session: &Session, record: &mut RequestRecord) {
        let Some(pod) = &record.pod else { return };
        self.parts.metrics.imdsv1();
        if session.is_news(&pod.uid, &head.headers, version1::PERIOD, record.began) {
            self.version1.log(pod, &head.headers);
        }
        self.parts.journal.imdsv1(&pod.uid, head, record.at);
        record.without_token = true;
    }

    /// Issues a token, locally and at once: after a failure SDKs would fall back to IMDSv1 and stay there.
    fn token(&self, client: &Client, head: &request::Parts) -> Result<Answer, Error> {
        let ttl = checks::ttl(&head.headers)?;
        let body = self.parts.tokens.issue(client, ttl).into();
        Ok(Answer { body, ttl: Some(ttl) })
    }

    /// The caller to look up instead of the client: the address in the query, where that is allowed.
    fn queried(&self, head: &request::Parts) -> Result<Option<Client>, Error> {
        let queried = match head.uri.query() {
            Some(query) if self.config.allow_ip_query => checks::queried(query)?,
            _ => None,
        };
        Ok(queried.map(Client::Address))
    }

    async fn read(
        &self,
        lookup: &Lookup<'_>,
        standing: Arc<Standing>,
        what: Readable,
        record: &mut RequestRecord,
    ) -> Result<Bytes, Error> {
        let body = match what {
            Readable::RoleName => {
                let issued = self.issued(lookup, standing, None, record).await?;
                issued.rendered.role_name.clone()
            }
            Readable::Credentials(form, role) => {
                let issued = self.issued(lookup, standing, Some(&role), record).await?;
                match form {
                    Form::Plain => issued.rendered.plain.clone(),
                    Form::Extended => issued.rendered.extended.clone(),
                }
            }
            Readable::InstanceProfile => {
                let identity = self.identity(lookup, standing, record).await?;
                wire::instance_profile(&identity.role, self.parts.clock.now())
            }
            Readable::Listing(body) => Bytes::from_static(body.as_bytes()),
            Readable::Upstream(path) => {
                let body = self.parts.upstream.get(&path, standing.pod()).await?;
                self.authorised(lookup, record).await?;
                body
            }
        };
        Ok(body)
    }

    fn count_first(&self, lookup: &Lookup<'_>, record: &RequestRecord, outcome: (bool, bool)) {
        let Some(pod) = &record.pod else { return };
        if lookup.session.is_some_and(|session| !session.asks_first()) {
            return;
        }
        let (waited, ready) = outcome;
        if self.first.is_first(&pod.uid, &self.parts.pods) {
            self.parts.metrics.first_request(FirstRequestOutcome::of(waited, ready));
        }
    }

    /// The pod's credentials, if it requests its own role's. Waits for pending ones.
    async fn issued(
        &self,
        lookup: &Lookup<'_>,
        standing: Arc<Standing>,
        requested: Option<&RequestedRole>,
        record: &mut RequestRecord,
    ) -> Result<Arc<IssuedCredentials>, Error> {
        let mut identity = self.identity(lookup, standing, record).await?;
        loop {
            if let Some(requested) = requested.filter(|requested| !requested.names(&identity.role))
            {
                return Err(other_role(requested, record.pod.as_deref(), &self.parts));
            }
            let mut state = self.parts.credentials.get(&identity);
            let waited = !matches!(state, Some(State::Ready(_)));
            if waited {
                state = self.parts.credentials.wait(&identity, lookup.left()).await;
            }
            let issued = ready(state);
            self.count_first(lookup, record, (waited, issued.is_ok()));
            let issued = issued?;
            // Meanwhile the pod may have ended, its role may have been changed or forbidden, or a token may be required.
            if waited {
                let standing = self.authorised(lookup, record).await?;
                let now = self.identity(lookup, standing, record).await?;
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

mod lookup;

#[cfg(test)]
pub(super) mod fixture;
#[cfg(test)]
mod revoked;
#[cfg(test)]
mod spellings;
#[cfg(test)]
mod tests;
