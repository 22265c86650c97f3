//! What STS's errors mean for the next attempt.

use std::error::Error as StdError;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_sts::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
};

use kiam_core::{
    credentials::{ErrorClass, SourceError},
    role::RoleArn,
    telemetry::Chain,
};

/// Characters of a message; it ends in logs and in a header.
const MAX_MESSAGE: usize = 500;

/// Those that stay until somebody changes the role or the flags. All else may pass by itself, also what
/// AWS refuses about the node's own credentials: the chain gets new ones.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html#API_AssumeRole_Errors>
const DENIED: [&str; 8] = [
    "AccessDenied",
    "AccessDeniedException",
    "IDPRejectedClaim",
    "MalformedPolicyDocument",
    "PackedPolicyTooLarge",
    "RegionDisabled",
    "RegionDisabledException",
    "ValidationError",
];

/// <https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html>
const THROTTLED: [&str; 5] = [
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "TooManyRequestsException",
];

/// What became of a call.
#[derive(Debug)]
pub(super) enum Failure {
    /// The role's sessions may not last so long.
    TooLong(SourceError),
    /// Nor may chained sessions of any role.
    Chained(SourceError),
    /// All else.
    Other(SourceError),
}

/// The session in between (`--assume-role-arn`) can't be had.
#[derive(Debug, thiserror::Error)]
#[error("--assume-role-arn {role}: {error}")]
pub(super) struct HopError {
    pub(super) role: RoleArn,
    pub(super) error: SourceError,
}

/// Classes `error`, and says in a line what happened; `through` is the role that asked, if not the node.
pub(super) fn failure<E>(error: &SdkError<E, HttpResponse>, through: Option<&RoleArn>) -> Failure
where
    E: StdError + ProvideErrorMetadata + 'static,
{
    let classed = classed(error, through);
    let service = error.as_service_error().filter(|it| it.code() == Some("ValidationError"));
    match service.and_then(|it| it.message()) {
        Some(text) if text.contains("MaxSessionDuration") => Failure::TooLong(classed),
        Some(text) if text.contains("role chaining") => Failure::Chained(classed),
        _ => Failure::Other(classed),
    }
}

fn classed<E>(error: &SdkError<E, HttpResponse>, through: Option<&RoleArn>) -> SourceError
where
    E: StdError + ProvideErrorMetadata + 'static,
{
    let SdkError::ServiceError(service) = error else {
        return unasked(error);
    };
    let status = service.raw().status().as_u16();
    let Some(code) = service.err().code() else {
        return retryable(&format!("STS answered {status} with a body that is none of its own"));
    };
    let text = service.err().message().unwrap_or("no message");
    let class = if THROTTLED.contains(&code) || status == 429 {
        ErrorClass::Throttled
    } else if DENIED.contains(&code) && status < 500 {
        ErrorClass::Denied
    } else {
        ErrorClass::Retryable
    };
    let hint = hint(code, text);
    let by = through.map(|role| format!(", asked by way of {role}")).unwrap_or_default();
    SourceError { class, message: one_line(&format!("STS{by}: {code}: {text}{hint}")) }
}

/// What to do about it, where the flags have to do with it.
fn hint(code: &str, text: &str) -> &'static str {
    let says = |part| text.contains(part);
    match code {
        "ValidationError" if says("MaxSessionDuration") || says("role chaining") => {
            "; shorten --session-duration or raise the role's maximum"
        }
        "AccessDenied" if says("sts:TagSession") => {
            "; the role's trust policy must allow sts:TagSession, for --session-tags"
        }
        "AccessDenied" if says("sts:SetSourceIdentity") => {
            "; the role's trust policy must allow sts:SetSourceIdentity, for --source-identity"
        }
        "PackedPolicyTooLarge" => "; send fewer --session-tags or session policies",
        _ => "",
    }
}

/// An error that may pass by itself.
pub(super) fn retryable(message: &str) -> SourceError {
    SourceError { class: ErrorClass::Retryable, message: one_line(message) }
}

/// Why there is no answer: nobody gave credentials to ask with, or STS is not reached.
fn unasked(error: &(dyn StdError + 'static)) -> SourceError {
    let causes = || std::iter::successors(Some(error), |cause| (*cause).source());
    if let Some(hop) = causes().find_map(|cause| cause.downcast_ref::<HopError>()) {
        // What AWS denies the agent is not the pods' doing, and ends as soon as somebody puts it right.
        let class = match hop.error.class {
            ErrorClass::Throttled => ErrorClass::Throttled,
            _ => ErrorClass::Retryable,
        };
        return SourceError { class, message: one_line(&hop.to_string()) };
    }
    // Not the SDK's `DisplayErrorContext`: that shows the body of an answer that it can't parse, secrets and all.
    match causes().find(|cause| cause.is::<CredentialsError>()) {
        Some(cause) => {
            retryable(&format!("the node's own credentials can't be loaded: {}", Chain(cause)))
        }
        None => retryable(&format!("STS could not be asked: {}", Chain(error))),
    }
}

fn one_line(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE).collect()
}
