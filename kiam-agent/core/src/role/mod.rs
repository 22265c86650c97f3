//! Names a role the way AWS and kiam do.
//!
//! The text of annotations and flags is parsed here, once, into types that can't be wrong. No other module checks a
//! role, a session name or an external id again.

mod account;
mod arn;
mod policies;
mod resolver;
mod session;
mod tags;
mod template;
mod wanted;

use std::{borrow::Cow, fmt, time::Duration};

pub use self::{
    account::{AccountName, Source},
    arn::{InvalidRole, RoleArn, RoleProblem},
    policies::{InvalidPolicies, PolicyArn, SessionPolicies},
    resolver::{BaseArn, RoleResolver},
    session::{ExternalId, InvalidExternalId, InvalidSessionName, SessionName},
    tags::{InvalidTags, SessionTags, TagTemplate},
    template::{ClusterName, InvalidClusterName, InvalidTemplate, Location, NameTemplate, Subject},
    wanted::{Claimant, Sessions, WantedRoles},
};

/// Everything that is sent to STS for one role: the key of the credential cache.
///
/// Two pods share credentials only when all of it is equal. `Display` is for logs: it shows no external id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleIdentity {
    /// The role to assume.
    pub role: RoleArn,
    /// The session name, which CloudTrail shows.
    pub session_name: SessionName,
    /// The external id that the role's trust policy may ask for.
    pub external_id: Option<ExternalId>,
    /// The requested duration of the session.
    pub duration: Duration,
    /// Tags of the session, all of them transitive.
    pub tags: SessionTags,
    /// The source identity, which CloudTrail shows for this session and all sessions chained to it.
    pub source_identity: Option<SessionName>,
    /// Managed policies that limit the session to what both they and the role allow. None is no limit.
    pub policies: SessionPolicies,
    /// The ServiceAccount whose token vouches for the session, with web identity. Pods of different accounts never share
    /// a session.
    pub service_account: Option<AccountName>,
}

/// The number of characters of a wrong value that its error shows.
const MAX_SHOWN: usize = 128;

// === impl RoleIdentity ===

impl RoleIdentity {
    /// The role's session of this name and length, with nothing else.
    #[must_use]
    pub fn new(role: RoleArn, session_name: SessionName, duration: Duration) -> Self {
        Self {
            role,
            session_name,
            external_id: None,
            duration,
            tags: SessionTags::default(),
            source_identity: None,
            policies: SessionPolicies::default(),
            service_account: None,
        }
    }
}

impl fmt::Display for RoleIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.role, self.session_name)
    }
}

/// Untrusted text for messages: quoted, in printable ASCII, and no longer than a line.
///
/// Errors use it because they end in logs and in a header of the pod's answer.
#[derive(Clone, PartialEq, Eq)]
pub struct QuotedText(String);

/// The bytes that are shown as they are, in a table, since requests are looked through.
const AS_IT_IS: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = b' ';
    while byte <= b'~' {
        table[byte as usize] = !matches!(byte, b'\\' | b'\'' | b'"');
        byte += 1;
    }
    table
};

// === impl QuotedText ===

impl QuotedText {
    /// Keeps the part of `text` that is shown.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut shown: String = text.chars().take(MAX_SHOWN).collect();
        if shown.len() < text.len() {
            shown.push_str("...");
        }
        Self(shown.escape_default().to_string())
    }

    /// The part of `text` that is shown, without the quotes: borrowed where it is all of `text`, as it mostly is.
    #[must_use]
    pub fn of_bytes(text: &[u8]) -> Cow<'_, str> {
        match str::from_utf8(text) {
            Ok(text) => Self::of_text(text),
            Err(_) => Cow::Owned(Self::new(&String::from_utf8_lossy(text)).0),
        }
    }

    /// The same of text.
    #[must_use]
    pub fn of_text(text: &str) -> Cow<'_, str> {
        if text.len() <= MAX_SHOWN && text.bytes().all(|byte| AS_IT_IS[usize::from(byte)]) {
            Cow::Borrowed(text)
        } else {
            Cow::Owned(Self::new(text).0)
        }
    }

    /// The shown part, without the quotes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for QuotedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl fmt::Debug for QuotedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_shows_no_external_id() {
        let role = "arn:aws:iam::123456789012:role/reader".parse().unwrap();
        let name = SessionName::sanitised("kiam-kiam");
        let plain = RoleIdentity::new(role, name, Duration::from_secs(3600));
        let identity = RoleIdentity { external_id: Some("hunter2".parse().unwrap()), ..plain };
        assert_eq!(identity.to_string(), "arn:aws:iam::123456789012:role/reader as kiam-kiam");
        assert!(!format!("{identity:?}").contains("hunter2"));
    }

    #[test]
    fn quoted_text_is_short_printable_ascii() {
        assert_eq!(QuotedText::new("a\r\nX: \u{1b}é\"").to_string(), r#""a\r\nX: \u{1b}\u{e9}\"""#);
        let long = QuotedText::new(&"é".repeat(100_000)).to_string();
        assert!(long.len() < 1_000 && long.ends_with("...\""), "{}", long.len());
    }

    #[test]
    fn text_that_is_shown_as_it_is_needs_no_copy() {
        for (text, borrowed) in [
            (&b"aws-cli/2.15 (x86_64) ~"[..], true),
            (&b""[..], true),
            (&[b'a'; MAX_SHOWN][..], true),
            (&[b'a'; MAX_SHOWN + 1][..], false),
            (&b"a\\b"[..], false),
            (&b"\"a'"[..], false),
            (&b"a\tb\x7f"[..], false),
            ("é".as_bytes(), false),
            (&b"\xff"[..], false),
        ] {
            let shown = QuotedText::of_bytes(text);
            assert_eq!(shown, QuotedText::new(&String::from_utf8_lossy(text)).as_str());
            assert_eq!(matches!(shown, Cow::Borrowed(_)), borrowed, "{text:?}");
        }
    }
}
