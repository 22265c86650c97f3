//! Classifies STS's errors by what they mean for the next attempt.

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

/// The longest message, in characters: messages end in logs and in a header.
const MAX_MESSAGE: usize = 500;

/// Error codes that stay until somebody changes the role or the flags. All others may pass, also errors about the node's
/// own credentials, which are renewed.
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

/// Error codes of throttling.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html>
const THROTTLED: [&str; 5] = [
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "TooManyRequestsException",
];

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The role's sessions may not last this long.
    TooLong(SourceError),
    /// Chained sessions may not last this long, of any role.
    Chained(SourceError),
    /// Any other error.
    Other(SourceError),
}

/// How far a failed call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// There are no credentials for it.
    NoCredentials,
    /// STS can't be reached, or did not answer.
    NoConnection,
    /// STS rejected it, or the session of the role in between.
    Sts,
}

/// The session of `--assume-role-arn` can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("--assume-role-arn {role}: {error}")]
pub(super) struct HopError {
    pub(super) role: RoleArn,
    pub(super) error: SourceError,
}

/// Classifies `error`, with a message of one line. `through` is the role of the caller, if it is not the node.
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

/// The class of `error`, with a message of one line.
pub(super) fn classed<E>(
    error: &SdkError<E, HttpResponse>,
    through: Option<&RoleArn>,
) -> SourceError
where
    E: StdError + ProvideErrorMetadata + 'static,
{
    let SdkError::ServiceError(service) = error else {
        return unreached(error);
    };
    let status = service.raw().status().as_u16();
    let Some(code) = service.err().code() else {
        return retryable(&format!("STS answered {status} with a body that is not from STS"));
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
    let by = through.map(|role| format!(", called as {role}")).unwrap_or_default();
    SourceError { class, message: one_line(&format!("STS{by}: {code}: {text}{hint}")) }
}

/// The remedy, for errors that depend on flags.
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

/// How far the call of `error` came.
pub(super) fn reached<E: StdError + 'static>(error: &SdkError<E, HttpResponse>) -> Reached {
    let first: &(dyn StdError + 'static) = error;
    let causes = || std::iter::successors(Some(first), |cause| (*cause).source());
    if matches!(error, SdkError::ServiceError(_)) || causes().any(|cause| cause.is::<HopError>()) {
        return Reached::Sts;
    }
    match causes().any(|cause| cause.is::<CredentialsError>()) {
        true => Reached::NoCredentials,
        false => Reached::NoConnection,
    }
}

/// An error that may pass by itself.
pub(super) fn retryable(message: &str) -> SourceError {
    SourceError { class: ErrorClass::Retryable, message: one_line(message) }
}

/// The error of a call that did not reach STS: there are no credentials for it, or no connection.
fn unreached(error: &(dyn StdError + 'static)) -> SourceError {
    let causes = || std::iter::successors(Some(error), |cause| (*cause).source());
    if let Some(hop) = causes().find_map(|cause| cause.downcast_ref::<HopError>()) {
        // A denial of the agent's own role is not the pods' fault, and ends as soon as somebody fixes it.
        let class = match hop.error.class {
            ErrorClass::Throttled => ErrorClass::Throttled,
            _ => ErrorClass::Retryable,
        };
        return SourceError { class, message: one_line(&hop.to_string()) };
    }
    // Not the SDK's `DisplayErrorContext`, which shows the body of an answer that it can't parse, with secrets.
    match causes().find(|cause| cause.is::<CredentialsError>()) {
        Some(cause) => {
            retryable(&format!("the node's own credentials can't be loaded: {}", Chain(cause)))
        }
        None => retryable(&format!("STS can't be reached: {}", Chain(error))),
    }
}

fn one_line(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE).collect()
}
