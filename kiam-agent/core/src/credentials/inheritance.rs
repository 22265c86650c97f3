//! The cached credentials that an agent passes to its successor, so that a restart makes no calls to STS.
//!
//! They go from memory to memory, in a format that only this file knows. The key is a digest of the whole identity: no
//! external id travels, and fields that identities get later are part of the digest. An identity that differs in
//! anything is not found, and its credentials are fetched again.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    hash::{Hash as _, Hasher},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{Credentials, IssuedCredentials, call::checked, schedule::Term};
use crate::{
    clock::Clock,
    role::{InvalidRole, RoleIdentity},
    secret::Secret,
};

/// The format's version.
const VERSION: u32 = 1;

/// Bytes of one entry beside its texts, at most.
const OVERHEAD: usize = 512;

/// The predecessor's cached credentials; by default none.
#[derive(Default)]
pub struct Inheritance(HashMap<Key, InheritedCredentials>);

/// Why nothing is inherited. Retrying does not help.
#[derive(Debug, thiserror::Error)]
pub enum InheritanceError {
    /// The predecessor is of another release.
    #[error("its format is version {0}, and this agent reads version {VERSION}")]
    Version(u32),
    /// No agent writes this. The parser's message is dropped, as it may quote a secret.
    #[error("it is malformed at byte {0}")]
    Form(usize),
    /// A role's ARN is malformed.
    #[error("it has a malformed role: {0}")]
    Role(#[from] InvalidRole),
    /// A time is out of range.
    #[error("it has a time that is out of range")]
    Time,
}

type Key = [u8; 32];

struct InheritedCredentials {
    credentials: Credentials,
    begun: Instant,
    draw: f64,
}

/// The part that is read in every version.
#[derive(Deserialize)]
struct Form {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire<'a> {
    version: u32,
    #[serde(borrow)]
    held: Vec<Entry<'a>>,
}

/// One entry on the wire. Secrets are borrowed from the bytes, which are overwritten at the end, so that a secret with
/// JSON escapes is an error. The role is no secret, and its path may have escapes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<'a> {
    identity: Key,
    #[serde(borrow)]
    role: Cow<'a, str>,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    session_token: &'a str,
    /// Milliseconds since 1970.
    issued: u64,
    expires: u64,
    /// Milliseconds by the clock that no step moves.
    age: u64,
    draw: f64,
}

// === impl InheritanceError ===

impl From<serde_json::Error> for InheritanceError {
    fn from(error: serde_json::Error) -> Self {
        // The format is one line.
        Self::Form(error.column())
    }
}

// === impl Inheritance ===

impl Inheritance {
    /// Reads what [`write`] wrote.
    ///
    /// # Errors
    ///
    /// [`InheritanceError`]; then nothing is inherited.
    pub fn read(bytes: &[u8]) -> Result<Self, InheritanceError> {
        let Form { version } = serde_json::from_slice(bytes)?;
        if version != VERSION {
            return Err(InheritanceError::Version(version));
        }
        let wire: Wire<'_> = serde_json::from_slice(bytes)?;
        let given = wire.held.iter().map(|entry| Ok((entry.identity, entry.given()?)));
        Ok(Self(given.collect::<Result<_, InheritanceError>>()?))
    }

    /// The number of entries.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Removes the credentials of exactly `identity`, if they may still be served.
    pub(super) fn take(
        &mut self,
        identity: &RoleIdentity,
        clock: &Clock,
    ) -> Option<(Credentials, Term)> {
        let InheritedCredentials { credentials, begun, draw } = self.0.remove(&key(identity))?;
        checked(credentials, (begun, draw), identity, clock).ok()
    }
}

impl fmt::Debug for Inheritance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Inheritance({})", self.len())
    }
}

// === impl Entry ===

impl<'a> Entry<'a> {
    fn new(identity: &RoleIdentity, held: &'a IssuedCredentials) -> Self {
        let IssuedCredentials { credentials, term, .. } = held;
        Self {
            identity: key(identity),
            role: Cow::Borrowed(credentials.role.as_ref()),
            access_key_id: &credentials.access_key_id,
            secret_access_key: credentials.secret_access_key.expose(),
            session_token: credentials.session_token.expose(),
            issued: since_1970(credentials.issued),
            expires: since_1970(credentials.expires),
            age: millis(term.age(Instant::now())),
            draw: term.draw(),
        }
    }

    fn given(&self) -> Result<InheritedCredentials, InheritanceError> {
        let time = |millis| {
            let since = Duration::from_millis(millis);
            SystemTime::UNIX_EPOCH.checked_add(since).ok_or(InheritanceError::Time)
        };
        let age = Duration::from_millis(self.age);
        let credentials = Credentials {
            role: self.role.parse()?,
            access_key_id: self.access_key_id.to_owned(),
            secret_access_key: Secret::new(self.secret_access_key),
            session_token: Secret::new(self.session_token),
            issued: time(self.issued)?,
            expires: time(self.expires)?,
        };
        let begun = Instant::now().checked_sub(age).ok_or(InheritanceError::Time)?;
        Ok(InheritedCredentials { credentials, begun, draw: self.draw })
    }
}

/// Serializes `held` for another agent. All of the bytes are secret.
pub(super) fn write<'a>(
    held: impl Iterator<Item = (&'a RoleIdentity, &'a IssuedCredentials)>,
) -> Zeroizing<Vec<u8>> {
    let held: Vec<_> = held.map(|(identity, held)| Entry::new(identity, held)).collect();
    let texts = |entry: &Entry<'_>| {
        let keys = entry.access_key_id.len() + entry.secret_access_key.len();
        entry.role.len() + keys + entry.session_token.len()
    };
    // Enough at once: a vector that grows leaves a copy behind.
    let most = OVERHEAD + held.iter().map(|entry| OVERHEAD + texts(entry)).sum::<usize>();
    let mut bytes = Zeroizing::new(Vec::with_capacity(most));
    serde_json::to_writer(&mut *bytes, &Wire { version: VERSION, held })
        .expect("numbers and texts can be written to memory");
    bytes
}

/// A digest of all fields of `identity`.
fn key(identity: &RoleIdentity) -> Key {
    struct Digest(Sha256);
    impl Hasher for Digest {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }

        /// Unused: 64 bits are too few to tell identities apart.
        fn finish(&self) -> u64 {
            0
        }
    }
    let mut digest = Digest(Sha256::new());
    identity.hash(&mut digest);
    digest.0.finalize().into()
}

fn since_1970(time: SystemTime) -> u64 {
    millis(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
