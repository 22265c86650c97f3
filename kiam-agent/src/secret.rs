//! A string that can't be printed by accident.

use std::fmt;

use zeroize::Zeroizing;

/// A secret access key, session token or bearer token.
///
/// It implements neither `Display` nor `Serialize`, its `Debug` says nothing of its contents, and its
/// memory is overwritten when it is dropped. Whoever needs the text calls [`Secret::expose`], so that a
/// search for that word finds every place a secret can leave by.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

// === impl Secret ===

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text itself. Not for logs, metrics, errors or headers.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_does_not_reveal_the_text() {
        let secret = Secret::new("wJalrXUtnFEMI");
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        assert_eq!(format!("{:?}", Some(&secret)), "Some(Secret(…))");
        assert_eq!(secret.expose(), "wJalrXUtnFEMI");
    }
}
