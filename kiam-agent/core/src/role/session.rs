//! The session name and the external id that are sent to STS with a role.
//!
//! Limits: <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>

use std::{fmt, str::FromStr, sync::Arc};

use super::{QuotedText, arn::is_name_byte};

pub(super) const SESSION_NAME_LENGTH: std::ops::RangeInclusive<usize> = 2..=64;
/// The prefix of a pod's `iam.amazonaws.com/session-name`, as in kiam.
pub(super) const SESSION_PREFIX: &str = "kiam-";
const EXTERNAL_ID_LENGTH: std::ops::RangeInclusive<usize> = 2..=1224;

/// A `RoleSessionName` as STS accepts it: 2 to 64 of `[\w+=,.@-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionName(Arc<str>);

/// An `ExternalId` as STS accepts it: 2 to 1,224 of `[\w+=,.@:/-]`.
///
/// `Debug` does not show it, and it has no `Display`: whoever knows it can assume the role from elsewhere.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExternalId(Arc<str>);

/// Text that is not a session name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("session name {0} is invalid: it takes 2 to 64 of A-Z a-z 0-9 _ + = , . @ -")]
pub struct InvalidSessionName(QuotedText);

/// Text that is not an external id. The text itself is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the external id is invalid: it takes 2 to 1224 of A-Z a-z 0-9 _ + = , . @ : / -")]
pub struct InvalidExternalId;

// === impl SessionName ===

impl SessionName {
    /// Makes a session name of any text, as kiam does: invalid characters become `-`, and the text is cut to 64.
    #[must_use]
    pub fn sanitised(text: &str) -> Self {
        let allowed = |c: char| u8::try_from(c).is_ok_and(is_name_byte);
        let mut name: String = text
            .chars()
            .map(|c| if allowed(c) { c } else { '-' })
            .take(*SESSION_NAME_LENGTH.end())
            .collect();
        while name.len() < *SESSION_NAME_LENGTH.start() {
            name.push('-');
        }
        Self(name.into())
    }
}

impl FromStr for SessionName {
    type Err = InvalidSessionName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if SESSION_NAME_LENGTH.contains(&text.len()) && text.bytes().all(is_name_byte) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidSessionName(QuotedText::new(text)))
        }
    }
}

impl AsRef<str> for SessionName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl ExternalId ===

impl ExternalId {
    /// The text itself. Not for logs, metrics, errors or headers.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl FromStr for ExternalId {
    type Err = InvalidExternalId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |byte| is_name_byte(byte) || b":/".contains(&byte);
        if EXTERNAL_ID_LENGTH.contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidExternalId)
        }
    }
}

impl fmt::Debug for ExternalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExternalId(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_a_session_name_that_sts_takes() {
        let long = "x".repeat(100);
        let cases = [
            ("kiam-kiam", "kiam-kiam"),
            ("a_b+c=d,e.f@g-h", "a_b+c=d,e.f@g-h"),
            ("kiam-my session/é!", "kiam-my-session---"),
            ("", "--"),
            ("a", "a-"),
            (long.as_str(), &long[..64]),
        ];
        for (text, name) in cases {
            let sanitised = SessionName::sanitised(text);
            assert_eq!(sanitised.as_ref(), name);
            assert_eq!(sanitised.as_ref().parse(), Ok(sanitised.clone()));
        }
    }

    #[test]
    fn session_names_are_parsed_strictly() {
        for text in ["", "a", "a b", "a:b", "kiam\n", "é-é", &"x".repeat(65)] {
            assert!(text.parse::<SessionName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn external_ids_are_parsed_strictly_and_not_shown() {
        for text in ["", "a", "a b", "ab\n", "a*b", "éé", &"x".repeat(1225)] {
            let error = text.parse::<ExternalId>().unwrap_err();
            assert!(text.len() < 2 || !error.to_string().contains(text), "{text:?}");
        }
        for text in ["ab", "a_+=,.@:/-9", &"x".repeat(1224)] {
            let id: ExternalId = text.parse().unwrap();
            assert_eq!((id.expose(), format!("{id:?}").as_str()), (text, "ExternalId(…)"));
        }
    }
}
