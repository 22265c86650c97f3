//! The metrics of pods' requests.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::StatusCode;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::{
    Error, ErrorKind,
    first_requests::FirstRequestOutcome,
    route::{Form, Readable, Route},
};
use kiam_core::telemetry::{ByLabel, Statsd, register};

/// The kind of a request, by its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum RequestKind {
    Token,
    RoleName,
    Credentials,
    CredentialsExtended,
    InstanceProfile,
    Listing,
    Upstream,
    Unrouted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: RequestKind,
    status: u32,
}

/// The counters of answers with status 200, once there are any: looking one up in the family costs more than counting.
#[derive(Debug, Default)]
struct Accepted {
    token: OnceLock<Counter>,
    role_name: OnceLock<Counter>,
    credentials: OnceLock<Counter>,
    credentials_extended: OnceLock<Counter>,
    instance_profile: OnceLock<Counter>,
    listing: OnceLock<Counter>,
    upstream: OnceLock<Counter>,
    unrouted: OnceLock<Counter>,
}

/// The metadata service's metrics, in Prometheus' form and in kiam v1's StatsD names.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    accepted: Arc<Accepted>,
    refusals: ByLabel<ErrorKind, Counter>,
    imdsv1: Counter,
    first: ByLabel<FirstRequestOutcome, Counter>,
    duration: Histogram,
    statsd: Statsd,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`; timings go to `statsd` too.
    pub fn register(registry: &mut Registry, statsd: Statsd) -> Self {
        let metrics = Self {
            requests: register(
                registry,
                "kiam_imds_requests",
                "Requests of pods, by kind of path and status of the answer",
            ),
            accepted: Arc::default(),
            refusals: ByLabel::register(
                registry,
                "kiam_imds_refusals",
                "Rejected requests, by reason",
                "reason",
            ),
            imdsv1: register(
                registry,
                "kiam_imds_v1_requests",
                "Accepted requests without a token (IMDSv1)",
            ),
            first: ByLabel::register(
                registry,
                "kiam_imds_first_requests",
                "First requests of pods for credentials, by whether the credentials were cached",
                "found",
            ),
            // 100 µs to 0.8 s: SDKs give up between half a second and one.
            duration: Histogram::new(exponential_buckets(0.000_1, 2.0, 14)),
            statsd,
        };
        use FirstRequestOutcome::{Failed, Ready, Waited};
        metrics.first.show([Ready, Waited, Failed]);
        use ErrorKind::{AddressMismatch, ForwardedFor, Host, Unattested};
        metrics.refusals.show([AddressMismatch, ForwardedFor, Host, Unattested]);
        registry.register(
            "kiam_imds_request_duration_seconds",
            "Time from a request's head to its answer, holds included",
            metrics.duration.clone(),
        );
        metrics
    }

    pub(super) fn imdsv1(&self) {
        self.imdsv1.inc();
    }

    pub(super) fn first_request(&self, found: FirstRequestOutcome) {
        self.first.of(found).inc();
    }

    pub(super) fn answered(
        &self,
        asked: RequestKind,
        status: StatusCode,
        refusal: Option<&Error>,
        took: Duration,
    ) {
        let labels = RequestLabels { route: asked, status: u32::from(status.as_u16()) };
        if status == StatusCode::OK {
            let counter = self.accepted.of(asked);
            counter.get_or_init(|| self.requests.get_or_create_owned(&labels)).inc();
        } else {
            self.requests.get_or_create(&labels).inc();
        }
        if let Some(error) = refusal {
            self.refusals.of(error.kind()).inc();
        }
        self.duration.observe(took.as_secs_f64());
        match asked {
            RequestKind::RoleName => self.statsd.timing("handler.role_name", took),
            RequestKind::Credentials | RequestKind::CredentialsExtended => {
                self.statsd.timing("handler.credentials", took);
                match status {
                    StatusCode::OK => self.statsd.incr("credentialsCache.cacheHit"),
                    StatusCode::SERVICE_UNAVAILABLE => {
                        self.statsd.incr("credentialsCache.cacheMiss");
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

// === impl Accepted ===

impl Accepted {
    fn of(&self, kind: RequestKind) -> &OnceLock<Counter> {
        match kind {
            RequestKind::Token => &self.token,
            RequestKind::RoleName => &self.role_name,
            RequestKind::Credentials => &self.credentials,
            RequestKind::CredentialsExtended => &self.credentials_extended,
            RequestKind::InstanceProfile => &self.instance_profile,
            RequestKind::Listing => &self.listing,
            RequestKind::Upstream => &self.upstream,
            RequestKind::Unrouted => &self.unrouted,
        }
    }
}

// === impl RequestKind ===

impl RequestKind {
    pub(super) fn of(route: &Result<Route, Error>) -> Self {
        let what = match route {
            Ok(Route::Token) => return Self::Token,
            Ok(Route::Read(what)) => what,
            Err(_) => return Self::Unrouted,
        };
        match what {
            Readable::RoleName => Self::RoleName,
            Readable::Credentials(Form::Plain, _) => Self::Credentials,
            Readable::Credentials(Form::Extended, _) => Self::CredentialsExtended,
            Readable::InstanceProfile => Self::InstanceProfile,
            Readable::Listing(_) => Self::Listing,
            Readable::Upstream(_) => Self::Upstream,
        }
    }
}
