//! Requests tokens of pods' ServiceAccounts, for AWS STS alone. They are used at once and never stored.

use std::time::Duration;

use futures::future::BoxFuture;
use kube::{
    api::PostParams,
    core::{Request, Status},
};
use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;

use super::{
    describe,
    metrics::{Metrics, TokenOutcome},
};
use kiam_core::{
    credentials::{ErrorClass, PodTokens, SourceError},
    pods::{Pod, PodReader, PodUid},
    role::{AccountName, Claimant},
    secret::Secret,
};

/// The audience that STS expects, in all partitions: IAM's identity providers have it in China, too.
/// <https://docs.aws.amazon.com/eks/latest/userguide/enable-iam-roles-for-service-accounts.html>
const AUDIENCE: &str = "sts.amazonaws.com";
/// The lifetime of a token, in seconds: the shortest that the API accepts.
const LIFE: u32 = 600;
/// The deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest token that STS accepts, in characters.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html>
const LONGEST: usize = 20_000;

/// A source of tokens for this node's pods.
pub(super) struct Tokens {
    pub(super) client: kube::Client,
    pub(super) reader: PodReader,
    pub(super) metrics: Metrics,
}

#[derive(Deserialize)]
struct TokenRequest {
    status: TokenStatus,
}

#[derive(Deserialize)]
struct TokenStatus {
    token: String,
}

// === impl Tokens ===

impl Tokens {
    async fn request(
        &self,
        account: &AccountName,
        claimant: &Claimant,
    ) -> Result<Secret, SourceError> {
        let uid = PodUid::new(&claimant.pod);
        let pod = self.reader.by_uid(&uid).ok();
        // The server checks this, too.
        let pod =
            pod.filter(|pod| pod.uid == uid && pod.account() == *account).ok_or_else(|| {
                let text = format!("there is no pod {} of ServiceAccount {account}", claimant.pod);
                SourceError::new(ErrorClass::Retryable, &text)
            })?;
        let failed = |class: ErrorClass, problem: &str| {
            let Pod { namespace, name, .. } = &*pod;
            let text = format!("no token of {account} for pod {namespace}/{name}: {problem}");
            SourceError::new(class, &text)
        };
        let retry = |problem: &str| failed(ErrorClass::Retryable, problem);
        let accounts = format!("/api/v1/namespaces/{}/serviceaccounts", account.namespace);
        let request = Request::new(accounts)
            .create_subresource("token", &account.name, &PostParams::default(), body(&pod))
            .map_err(|error| retry(&error.to_string()))?;
        // Not kube's own parsing, which logs a text that it can't parse.
        let answer = timeout(DEADLINE, self.client.request_text(request)).await;
        let answer = answer.map_err(|_| retry("the Kubernetes API does not answer"))?;
        let answer = answer.map_err(|error| match &error {
            kube::Error::Api(status) => failed(class(status), &explain(status)),
            error => retry(&describe(error)),
        })?;
        let token = read(&Secret::new(answer));
        token.ok_or_else(|| retry("the Kubernetes API answers without a token"))
    }

    fn count(&self, result: Result<&Secret, &SourceError>) {
        let outcome = match result.map_err(|error| error.class) {
            Ok(_) => TokenOutcome::Issued,
            Err(ErrorClass::Denied | ErrorClass::Refused) => TokenOutcome::Denied,
            Err(ErrorClass::Throttled) => TokenOutcome::Throttled,
            Err(ErrorClass::Retryable | ErrorClass::TooLong) => TokenOutcome::Failed,
        };
        self.metrics.tokens.of(outcome).inc();
    }
}

impl PodTokens for Tokens {
    fn token<'a>(
        &'a self,
        account: &'a AccountName,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Secret, SourceError>> {
        Box::pin(async move {
            let result = self.request(account, claimant).await;
            self.count(result.as_ref());
            result
        })
    }
}

/// The request for a token that is valid for STS, and while `pod` exists.
/// <https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-request-v1/>
fn body(pod: &Pod) -> Vec<u8> {
    let bound =
        json!({"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid.to_string()});
    let spec = json!({"audiences": [AUDIENCE], "expirationSeconds": LIFE, "boundObjectRef": bound});
    let request =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
    request.to_string().into_bytes()
}

fn read(answer: &Secret) -> Option<Secret> {
    let TokenRequest { status } = serde_json::from_str(answer.expose()).ok()?;
    let token = Secret::new(status.token);
    let text = token.expose();
    let is_token =
        (1..=LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    is_token.then_some(token)
}

/// The class of an error; errors that may pass are retryable. An authorizer that does not know yet that the pod is on this
/// node answers 403, too, like a policy that denies the token for good.
fn class(status: &Status) -> ErrorClass {
    match status.code {
        _ if lacks_right(status) => ErrorClass::Denied,
        403 => ErrorClass::Refused,
        429 => ErrorClass::Throttled,
        _ => ErrorClass::Retryable,
    }
}

/// Whether the agent lacks the right to create such objects at all. The node authorizer, which decides for each pod, has
/// the same message with a reason.
pub(super) fn lacks_right(status: &Status) -> bool {
    let denied = status.message.contains("cannot create resource");
    status.code == 403 && denied && !is_elsewhere(status)
}

/// Whether the node authorizer does not know the pod on this node, or not yet.
fn is_elsewhere(status: &Status) -> bool {
    status.message.contains("no relationship found")
}

/// The text of an error. The remedy comes first: a pod gets only the beginning.
fn explain(status: &Status) -> String {
    let Status { code, message, .. } = status;
    let advice = match code {
        _ if lacks_right(status) => "apply deploy/web-identity, which grants it: ",
        403 if is_elsewhere(status) => "--token-kubeconfig is of a node without the pod: ",
        404 | 409 => "the pod is gone or ending: ",
        _ => "",
    };
    format!("{advice}{code}: {message}")
}
