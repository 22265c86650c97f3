//! What `kiam-agent preflight` asks the Kubernetes API: whether it answers, and which rights the agent has there.

use std::time::Duration;

use http::{Request as HttpRequest, Uri, header};
use http_body_util::BodyExt as _;
use kube::{api::PostParams, client::Body, core::Request};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Cluster, Config, Error, describe, files::Origin};

/// Where a server says what it allows the caller
/// (<https://kubernetes.io/docs/reference/access-authn-authz/authorization/#checking-api-access>).
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
/// The deadline of one request.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why the server did not answer. A retry may help.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The request failed.
    #[error("{}", describe(.0))]
    Request(#[from] kube::Error),
    /// The request can't be built.
    #[error("can't build the request: {0}")]
    Build(#[from] kube::core::request::Error),
    /// The server did not answer in time.
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Deadline(#[from] tokio::time::error::Elapsed),
    /// The answer is not what such a server sends.
    #[error("the server answers {0}")]
    Malformed(String),
}

/// A server's version.
#[derive(Clone, Debug)]
pub struct ServerVersion {
    /// The version, such as `v1.35.0`.
    pub name: String,
    /// The second number; `None` if there is none.
    pub minor: Option<u32>,
    /// The server's clock, as its header `Date` has it.
    pub date: Option<String>,
}

/// A right in the Kubernetes API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Right {
    /// The API group; empty for the core's.
    pub group: &'static str,
    /// The resource, such as `pods`, or with a subresource `pods/eviction`.
    pub resource: &'static str,
    /// The verb, such as `list`.
    pub verb: &'static str,
}

/// How requests reach the server.
#[derive(Clone, Debug)]
pub struct ServerRoute {
    /// The server's URL.
    pub server: Uri,
    /// The proxy's address, without credentials, if one is used.
    pub proxy: Option<Uri>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VersionInfo {
    git_version: String,
    minor: String,
}

// === impl Right ===

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if self.group.is_empty() { Ok(()) } else { write!(f, ".{}", self.group) }
    }
}

// === impl ServerRoute ===

impl ServerRoute {
    /// Reads how `config` reaches its server. Sends nothing.
    ///
    /// # Errors
    ///
    /// [`Error`] when the configuration can't be used.
    pub fn read(config: &Config) -> Result<Self, Error> {
        let described = Origin::new(config.kubeconfig.as_deref()).read(&config.proxies)?;
        let proxy = described.proxy.map(|proxy| proxy.address().clone());
        Ok(Self { server: described.config.cluster_url, proxy })
    }
}

// === impl Cluster ===

impl Cluster {
    /// The server's version, which every client may read.
    ///
    /// # Errors
    ///
    /// [`AccessError`].
    pub async fn version(&self) -> Result<ServerVersion, AccessError> {
        timeout(DEADLINE, async {
            let request = HttpRequest::get("/version").body(Body::empty());
            let request = request.expect("a path makes a request");
            let answer = self.client.send(request).await?;
            let (status, date) = (answer.status(), answer.headers().get(header::DATE));
            let date = date.and_then(|date| date.to_str().ok()).map(str::to_owned);
            if !status.is_success() {
                return Err(AccessError::Malformed(format!("{status} to /version")));
            }
            let body = answer.into_body().collect().await?.to_bytes();
            let malformed = |_| AccessError::Malformed("something else than a version".to_owned());
            let info: VersionInfo = serde_json::from_slice(&body).map_err(malformed)?;
            // Providers add a plus: `22+`.
            let minor = info.minor.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok();
            Ok(ServerVersion { name: info.git_version, minor, date })
        })
        .await?
    }

    /// Whether the agent has `right`, for all objects.
    ///
    /// # Errors
    ///
    /// [`AccessError`].
    pub async fn has(&self, right: Right) -> Result<bool, AccessError> {
        let Right { group, resource, verb } = right;
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes = json!({
            "group": group, "resource": resource, "subresource": subresource, "verb": verb,
        });
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": { "resourceAttributes": attributes },
        });
        let review = review.to_string().into_bytes();
        let request = Request::new(REVIEWS).create(&PostParams::default(), review)?;
        let answer: Value = timeout(DEADLINE, self.client.request(request)).await??;
        answer["status"]["allowed"]
            .as_bool()
            .ok_or_else(|| AccessError::Malformed("a review without a result".to_owned()))
    }
}
