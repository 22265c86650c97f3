//! The role in between (`--assume-role-arn`): the node assumes it, and with its session the pods' roles.

use std::fmt;

use aws_credential_types::{
    Credentials,
    provider::{self, ProvideCredentials, error::CredentialsError, future},
};

use super::{
    assume::StsClient,
    error::{Failure, HopError},
};
use kiam_core::role::RoleIdentity;

/// The provider of sessions of `--assume-role-arn`. The SDK caches each until shortly before its end.
pub(super) struct Hop {
    pub(super) client: StsClient,
    pub(super) identity: RoleIdentity,
}

// === impl Hop ===

impl Hop {
    async fn open(&self) -> provider::Result {
        let opened = self.client.ask(&self.identity, self.identity.duration).await;
        let session = opened.map_err(|failure| {
            let (Failure::TooLong(error) | Failure::Chained(error) | Failure::Other(error)) =
                failure;
            CredentialsError::provider_error(HopError { role: self.identity.role.clone(), error })
        })?;
        Ok(Credentials::new(
            session.access_key_id,
            session.secret_access_key.expose(),
            Some(session.session_token.expose().to_owned()),
            Some(session.expires),
            "--assume-role-arn",
        ))
    }
}

impl ProvideCredentials for Hop {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.open())
    }
}

impl fmt::Debug for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hop")
    }
}
