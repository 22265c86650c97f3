//! Who STS takes the caller for, for `kiam-agent preflight`.

use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_sdk_sts::Client;
use tokio::time::timeout;

use super::{
    AssumeRole, CALL_DEADLINE, Config, Error,
    error::{Reached, classed, reached},
    http, settings,
};
use kiam_core::{clock::Clock, role::Source};

/// More than one call: the node's credentials may have to be loaded, and a role in between assumed.
const DEADLINE: Duration = CALL_DEADLINE.saturating_mul(2);
/// What no pod's token is. STS answers it without looking at the role.
const NO_TOKEN: &str = "kiam-agent-preflight";
/// A role that nobody has, as account 000000000000 is nobody's.
const NO_ROLE: &str = "arn:aws:iam::000000000000:role/kiam-agent-preflight";

/// Why STS does not know the caller. The messages are one line, without secrets.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// There are no credentials.
    #[error("{0}")]
    Credentials(String),
    /// STS can't be reached.
    #[error("{0}")]
    Unreached(String),
    /// STS rejects the caller.
    #[error("{0}")]
    Rejected(String),
    /// There can be no client.
    #[error(transparent)]
    Client(#[from] Error),
}

/// The ARN by which STS knows the caller: the node's role, or that of a role in between. `None` with web identity, where
/// only whether STS answers is tried.
///
/// # Errors
///
/// [`CallerError`].
pub async fn caller(
    config: &Config,
    clock: Clock,
    source: Source,
) -> Result<Option<String>, CallerError> {
    super::ensure_certificates(config)?;
    let asked = async {
        match source {
            Source::Node => signed(config, clock).await.map(Some),
            Source::WebIdentity => unsigned(config).await.map(|()| None),
        }
    };
    timeout(DEADLINE, asked).await.unwrap_or_else(|_| {
        Err(CallerError::Unreached(format!("STS did not answer within {} s", DEADLINE.as_secs())))
    })
}

async fn signed(config: &Config, clock: Clock) -> Result<String, CallerError> {
    let source = AssumeRole::new(config, clock).await.map_err(Error::from)?;
    let answer = source.client.client.get_caller_identity().send().await;
    let answer = answer.map_err(|error| {
        let message = classed(&error, source.client.through.as_ref()).message;
        match reached(&error) {
            Reached::NoCredentials => CallerError::Credentials(message),
            Reached::NoConnection => CallerError::Unreached(message),
            Reached::Sts => CallerError::Rejected(message),
        }
    })?;
    let rejected = || CallerError::Rejected("STS names no caller".to_owned());
    answer.arn.filter(|arn| arn.starts_with("arn:")).ok_or_else(rejected)
}

/// Succeeds once STS answers, whatever it says to a token that is none.
async fn unsigned(config: &Config) -> Result<(), CallerError> {
    let loader =
        aws_config::defaults(BehaviorVersion::latest()).http_client(http::through(&config.proxies));
    let settings = settings(config, loader.no_credentials()).await;
    let asked = Client::from_conf(settings.build())
        .assume_role_with_web_identity()
        .role_arn(NO_ROLE)
        .role_session_name(NO_TOKEN)
        .web_identity_token(NO_TOKEN)
        .send()
        .await;
    match asked {
        Err(error) if reached(&error) != Reached::Sts => {
            Err(CallerError::Unreached(classed(&error, None).message))
        }
        _ => Ok(()),
    }
}
