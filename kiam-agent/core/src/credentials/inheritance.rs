//! What an agent leaves to the one that takes over from it: the credentials that it holds, so that a restart asks STS
//! for nothing.
//!
//! They go from memory to memory, in the form that this file alone knows. Whose they are is told by a digest of the
//! whole identity: no external id travels, and a field that identities get later is part of it without anybody's doing.
//! What differs in anything from what is wanted here is not found, and fetched anew.

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

/// The form's number.
const VERSION: u32 = 1;

/// What one entry takes beside its texts, at most.
const OVERHEAD: usize = 512;

/// What the agent before this one held; by default nothing.
#[derive(Default)]
pub struct Inheritance(HashMap<Key, InheritedCredentials>);

/// Why nothing is inherited. Trying again does not help.
#[derive(Debug, thiserror::Error)]
pub enum InheritanceError {
    /// It is of another release.
    #[error("its form is number {0}, and this agent knows number {VERSION}")]
    Version(u32),
    /// It is not what an agent writes. What the parser says of it is not kept: it may quote a secret.
    #[error("it can't be read: it is wrong at its byte {0}")]
    Form(usize),
    /// A role that is none.
    #[error("it has what is no role: {0}")]
    Role(#[from] InvalidRole),
    /// A time before all times.
    #[error("it has a time that can't be")]
    Time,
}

type Key = [u8; 32];

struct InheritedCredentials {
    credentials: Credentials,
    begun: Instant,
    draw: f64,
}

/// What is read of every form.
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

/// Secrets are borrowed from the bytes, which are overwritten at the end: what would have to be unescaped is refused. The
/// role is none, and its path may hold what JSON escapes.
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
        // All of it is one line.
        Self::Form(error.column())
    }
}

// === impl Inheritance ===

impl Inheritance {
    /// Reads what [`write`] wrote.
    ///
    /// # Errors
    ///
    /// [`InheritanceError`]; then nothing of it is to be used.
    pub fn read(bytes: &[u8]) -> Result<Self, InheritanceError> {
        let Form { version } = serde_json::from_slice(bytes)?;
        if version != VERSION {
            return Err(InheritanceError::Version(version));
        }
        let wire: Wire<'_> = serde_json::from_slice(bytes)?;
        let given = wire.held.iter().map(|entry| Ok((entry.identity, entry.given()?)));
        Ok(Self(given.collect::<Result<_, InheritanceError>>()?))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// What was held for exactly `identity`, if it may still be served.
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

/// The form in which `held` is left to another agent; all of it is secret.
pub(super) fn write<'a>(
    held: impl Iterator<Item = (&'a RoleIdentity, &'a IssuedCredentials)>,
) -> Zeroizing<Vec<u8>> {
    let held: Vec<_> = held.map(|(identity, held)| Entry::new(identity, held)).collect();
    let texts = |entry: &Entry<'_>| {
        let keys = entry.access_key_id.len() + entry.secret_access_key.len();
        entry.role.len() + keys + entry.session_token.len()
    };
    // Enough at once: what outgrows its place leaves a copy behind.
    let most = OVERHEAD + held.iter().map(|entry| OVERHEAD + texts(entry)).sum::<usize>();
    let mut bytes = Zeroizing::new(Vec::with_capacity(most));
    serde_json::to_writer(&mut *bytes, &Wire { version: VERSION, held })
        .expect("numbers and texts can be written to memory");
    bytes
}

/// A digest of all that makes the identity what it is.
fn key(identity: &RoleIdentity) -> Key {
    struct Digest(Sha256);
    impl Hasher for Digest {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }

        /// Too short to tell identities apart, and not asked for.
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
