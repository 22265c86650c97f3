//! The outcome of one call to the source.

use std::{
    panic::AssertUnwindSafe,
    time::{Duration, SystemTime},
};

use futures::FutureExt as _;
use tokio::time::{Instant, timeout};

use super::{Credentials, ErrorClass, SourceError, schedule::Term};
use crate::{
    clock::Clock,
    role::{Claimant, RoleIdentity},
};

/// The longest call. A source bounds its calls itself; this bounds one that hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// The latest time that answers and logs can show: the end of the year 9999, since 1970.
const WRITABLE: Duration = Duration::from_secs(253_402_300_799);

/// A finished call, with its result.
pub(super) struct FinishedCall {
    pub(super) identity: RoleIdentity,
    /// The pod that the call was made for.
    pub(super) claimant: Claimant,
    pub(super) begun: Instant,
    pub(super) result: Result<Credentials, SourceError>,
}

/// The answer of a source. A call that hangs or panics is an error like others, so that no key stays in flight for ever.
pub(super) async fn answer(
    call: impl Future<Output = Result<Credentials, SourceError>>,
) -> Result<Credentials, SourceError> {
    match timeout(DEADLINE, AssertUnwindSafe(call).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(retryable("the call to AWS panicked, which is a bug of the agent")),
        Err(_) => Err(retryable("AWS did not answer within a minute")),
    }
}

/// Checks `credentials` and computes their term. Credentials that must not be served are an error.
pub(super) fn checked(
    credentials: Credentials,
    (begun, draw): (Instant, f64),
    identity: &RoleIdentity,
    clock: &Clock,
) -> Result<(Credentials, Term), SourceError> {
    let term = Term::new(&credentials, begun, identity.duration, draw);
    let problem = if credentials.role != identity.role {
        "STS returned credentials of another role"
    } else if credentials.access_key_id.is_empty()
        || credentials.secret_access_key.expose().is_empty()
        || credentials.session_token.expose().is_empty()
    {
        "STS returned credentials with an empty field"
    } else if credentials.expires > SystemTime::UNIX_EPOCH + WRITABLE {
        "STS returned credentials that expire after the year 9999"
    } else if term.left(clock.now(), Instant::now()).is_zero() {
        "STS returned expired credentials (is the node's clock right?)"
    } else {
        return Ok((credentials, term));
    };
    Err(retryable(problem))
}

fn retryable(message: &str) -> SourceError {
    SourceError { class: ErrorClass::Retryable, message: message.to_owned() }
}
