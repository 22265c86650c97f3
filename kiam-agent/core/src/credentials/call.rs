//! One call to the source: what may become of it.

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

/// A source bounds its calls itself; this keeps one that does not from taking the place of others for ever.
const DEADLINE: Duration = Duration::from_secs(60);

/// Times that answers and logs can show, since 1970: up to the end of the year 9999.
const WRITABLE: Duration = Duration::from_secs(253_402_300_799);

/// A call that is over.
pub(super) struct FinishedCall {
    pub(super) identity: RoleIdentity,
    /// For whom STS was asked.
    pub(super) claimant: Claimant,
    pub(super) begun: Instant,
    pub(super) result: Result<Credentials, SourceError>,
}

/// The answer of a source, which always comes: hanging and panicking are errors like others, so that no key stays in
/// flight for ever.
pub(super) async fn answer(
    asked: impl Future<Output = Result<Credentials, SourceError>>,
) -> Result<Credentials, SourceError> {
    match timeout(DEADLINE, AssertUnwindSafe(asked).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(retryable("the call to AWS panicked, which is a bug of the agent")),
        Err(_) => Err(retryable("AWS did not answer within a minute")),
    }
}

/// Credentials that must not be served are an error; of others, for how long they are good.
pub(super) fn checked(
    credentials: Credentials,
    (begun, draw): (Instant, f64),
    identity: &RoleIdentity,
    clock: &Clock,
) -> Result<(Credentials, Term), SourceError> {
    let term = Term::new(&credentials, begun, identity.duration, draw);
    let problem = if credentials.role != identity.role {
        "STS answered credentials of another role"
    } else if credentials.access_key_id.is_empty()
        || credentials.secret_access_key.expose().is_empty()
        || credentials.session_token.expose().is_empty()
    {
        "STS answered credentials with an empty field"
    } else if credentials.expires > SystemTime::UNIX_EPOCH + WRITABLE {
        "STS answered credentials that outlast the year 9999"
    } else if term.left(clock.now(), Instant::now()).is_zero() {
        "STS answered credentials that have expired (is the node's clock right?)"
    } else {
        return Ok((credentials, term));
    };
    Err(retryable(problem))
}

fn retryable(message: &str) -> SourceError {
    SourceError { class: ErrorClass::Retryable, message: message.to_owned() }
}
