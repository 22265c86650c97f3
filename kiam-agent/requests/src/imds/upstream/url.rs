//! The URL of the real IMDS.

use std::{fmt, str::FromStr};

use http::Uri;
use kiam_core::role::QuotedText;

/// The URL of the real IMDS: `http://host[:port]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamUrl {
    host: String,
    port: u16,
}

/// Text that is not an [`UpstreamUrl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not the URL of an instance metadata service: expected http://HOST or http://HOST:PORT"
)]
pub struct InvalidUpstream(QuotedText);

// === impl UpstreamUrl ===

impl UpstreamUrl {
    /// The host and port to connect to.
    pub(in crate::imds) fn socket(&self) -> (&str, u16) {
        (self.host.trim_matches(['[', ']']), self.port)
    }
}

impl FromStr for UpstreamUrl {
    type Err = InvalidUpstream;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let uri: Uri = text.parse().ok()?;
            let authority = uri.authority()?;
            let port = match authority.as_str().strip_prefix(uri.host()?)? {
                "" => 80,
                // `parse` would accept a sign, too.
                port if port.contains('+') => return None,
                port => port.strip_prefix(':')?.parse().ok()?,
            };
            let bare =
                uri.scheme_str() == Some("http") && uri.path() == "/" && uri.query().is_none();
            bare.then(|| Self { host: authority.host().to_owned(), port })
        };
        parse().ok_or_else(|| InvalidUpstream(QuotedText::new(text)))
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            80 => write!(f, "http://{}", self.host),
            port => write!(f, "http://{}:{port}", self.host),
        }
    }
}
