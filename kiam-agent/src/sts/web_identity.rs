//! Credentials for a pod's own token, by the unsigned call `sts:AssumeRoleWithWebIdentity`.
//!
//! <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html>

use std::{fmt, sync::Arc, time::Duration};

use aws_config::BehaviorVersion;
use aws_sdk_sts::Client;
use futures::future::BoxFuture;

use super::{
    Config,
    assume::{checked, seconds},
    durations::Durations,
    error::{Failure, failure, retryable},
    http, parameters, settings,
};
use kiam_core::{
    clock::Clock,
    credentials::{CredentialSource, Credentials, ErrorClass, PodTokens, SourceError},
    role::{AccountName, Claimant, RoleIdentity},
    secret::Secret,
};

/// A source of credentials by `sts:AssumeRoleWithWebIdentity`, with tokens bound to one pod each. The node needs no
/// credentials.
pub struct WebIdentity {
    client: Client,
    clock: Clock,
    durations: Durations,
    tokens: Arc<dyn PodTokens>,
}

// === impl WebIdentity ===

impl WebIdentity {
    /// A source for `config` with the tokens of `tokens`. No request is made yet.
    pub async fn new(config: &Config, clock: Clock, tokens: Arc<dyn PodTokens>) -> Self {
        let loader = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http::through(&config.proxies));
        let settings = settings(config, loader.no_credentials()).await;
        let client = Client::from_conf(settings.build());
        Self { client, clock, durations: Durations::default(), tokens }
    }

    async fn assume(
        &self,
        identity: &RoleIdentity,
        claimant: &Claimant,
    ) -> Result<Credentials, SourceError> {
        let account = identity.service_account.as_ref();
        let account = account.ok_or_else(|| retryable("the identity has no ServiceAccount"))?;
        let token = self.tokens.token(account, claimant).await?;
        let ask = async |duration| {
            let answer = self.ask(identity, duration, &token).await;
            answer.map_err(|failure| match failure {
                Failure::Other(error) => Failure::Other(explained(error, identity, account)),
                failure => failure,
            })
        };
        self.durations.fit(identity, ask).await
    }

    async fn ask(
        &self,
        identity: &RoleIdentity,
        duration: Duration,
        token: &Secret,
    ) -> Result<Credentials, Failure> {
        let issued = self.clock.now();
        let answer = self
            .client
            .assume_role_with_web_identity()
            .role_arn(identity.role.as_ref())
            .role_session_name(identity.session_name.as_ref())
            .web_identity_token(token.expose())
            .duration_seconds(seconds(duration))
            .set_policy_arns(parameters::policies(identity))
            .send()
            .await
            .map_err(|error| failure(&error, None))?;
        let user = answer.assumed_role_user.as_ref().map(|user| user.arn());
        checked((user, answer.credentials), identity, (issued, duration)).map_err(Failure::Other)
    }
}

impl CredentialSource for WebIdentity {
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>> {
        Box::pin(self.assume(identity, claimant))
    }
}

impl fmt::Debug for WebIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebIdentity")
    }
}

/// Adds the remedy to errors that need a change in IAM.
fn explained(error: SourceError, identity: &RoleIdentity, account: &AccountName) -> SourceError {
    let SourceError { class, message } = error;
    let owner = identity.role.account();
    let says = |part: &str| message.contains(part);
    let (class, fix) = if says("AccessDenied") {
        let AccountName { namespace, name } = account;
        let fix = format!(
            "does the role's trust policy let system:serviceaccount:{namespace}:{name} assume it?"
        );
        (class, fix)
    } else if says("No OpenIDConnect provider") {
        let fix = format!(
            "account {owner} needs an IAM OIDC provider for the cluster's issuer, with the client ID sts.amazonaws.com"
        );
        (ErrorClass::Denied, fix)
    } else if says("Incorrect token audience") {
        let fix = format!(
            "the IAM OIDC provider of account {owner} needs the client ID sts.amazonaws.com"
        );
        (ErrorClass::Denied, fix)
    } else {
        return SourceError { class, message };
    };
    SourceError::new(class, &format!("{message}; {fix}"))
}
