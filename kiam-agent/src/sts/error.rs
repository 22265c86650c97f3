//! What STS's errors mean for the next attempt.

use std::error::Error as StdError;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_sts::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata as _, SdkError},
    operation::assume_role::AssumeRoleError,
};

use crate::credentials::{ErrorClass, SourceError};

/// Characters of a message; it ends in logs and in a header.
const MAX_MESSAGE: usize = 500;

/// Those that stay until somebody changes the role or the flags. All else may pass by itself, also what
/// AWS refuses about the node's own credentials: the chain gets new ones.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html#API_AssumeRole_Errors>
const DENIED: [&str; 7] = [
    "AccessDenied",
    "AccessDeniedException",
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

/// Classes `error`, and says in a line what happened.
pub(super) fn classed(error: &SdkError<AssumeRoleError, HttpResponse>) -> SourceError {
    let SdkError::ServiceError(service) = error else {
        return retryable(&unasked(error));
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
    let hint = if code == "ValidationError" && text.contains("MaxSessionDuration") {
        "; shorten --session-duration or raise the role's maximum"
    } else {
        ""
    };
    SourceError { class, message: one_line(&format!("STS: {code}: {text}{hint}")) }
}

/// An error that may pass by itself.
pub(super) fn retryable(message: &str) -> SourceError {
    SourceError { class: ErrorClass::Retryable, message: one_line(message) }
}

/// Why there is no answer: the node has no credentials to ask with, or STS is not reached.
fn unasked(error: &(dyn StdError + 'static)) -> String {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<CredentialsError>() {
            return format!("the node's own credentials can't be loaded: {}", chain(error));
        }
        cause = error.source();
    }
    format!("STS could not be asked: {}", chain(error))
}

/// The error and what caused it, by `Display` alone: the SDK's `Debug`, and so its
/// `DisplayErrorContext`, shows the body of an answer that it can't parse, secrets and all.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

fn one_line(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE).collect()
}
