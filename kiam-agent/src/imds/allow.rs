//! `--allow-path`: what pods may read of the real service beyond the built-in paths.

use std::str::FromStr;

use super::route::{is_denied, is_normalised, is_signature};
use crate::role::Quoted;

/// A path of `--allow-path`: exact, or everything below one (`/latest/meta-data/tags/*`).
///
/// It is written below `/latest` and holds at every version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowPath(Extent);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Extent {
    Exact(String),
    /// Ends in a slash.
    Below(String),
}

/// Why a text is no [`AllowPath`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAllowPath {
    /// Not below `/latest/`.
    #[error("{0} must begin with /latest/ (it then holds at every version)")]
    Version(Quoted),
    /// Requests for it are never routed.
    #[error(
        "{0} is not a normalised path: letters, digits and -_.~+=,@: in segments that are neither empty \
         nor dots, and at most one * as the whole last segment"
    )]
    Spelling(Quoted),
    /// It holds what is the node's alone.
    #[error("{0} can't be opened: it gives pods what belongs to the node alone")]
    Denied(Quoted),
}

// === impl AllowPath ===

impl AllowPath {
    /// Whether it opens `rest`, a normalised path after its version.
    pub(super) fn matches(&self, rest: &str) -> bool {
        match &self.0 {
            Extent::Exact(path) => path == rest,
            Extent::Below(folder) => rest.starts_with(folder.as_str()) && !is_signature(rest),
        }
    }
}

impl FromStr for AllowPath {
    type Err = InvalidAllowPath;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let quoted = || Quoted::new(text);
        let rest =
            text.strip_prefix("/latest/").ok_or_else(|| InvalidAllowPath::Version(quoted()))?;
        let (path, extent) = match rest.strip_suffix('*') {
            Some(folder) => (folder, Extent::Below(folder.to_owned())),
            None => (rest, Extent::Exact(rest.to_owned())),
        };
        let below_all = path.is_empty() && rest == "*";
        let is_folder = path.ends_with('/') || below_all;
        if !is_normalised(path)
            || (path.is_empty() && !below_all)
            || (matches!(extent, Extent::Below(_)) && !is_folder)
        {
            return Err(InvalidAllowPath::Spelling(quoted()));
        }
        if !below_all && is_denied(path) {
            return Err(InvalidAllowPath::Denied(quoted()));
        }
        Ok(Self(extent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allow_paths_are_checked_when_they_are_parsed() {
        let good = [
            "/latest/*",
            "/latest/meta-data/*",
            "/latest/meta-data/mac",
            "/latest/meta-data/tags/*",
            "/latest/meta-data/network/interfaces/macs/02:29:96:8f:6a:2d/vpc-id",
            "/latest/dynamic/instance-identity/document",
            "/latest/dynamic/instance-identity/rsa2048",
        ];
        for text in good {
            assert!(text.parse::<AllowPath>().is_ok(), "{text}");
        }
        let bad = [
            ("", "must begin"),
            ("/", "must begin"),
            ("*", "must begin"),
            ("latest/meta-data/mac", "must begin"),
            ("/2016-09-02/meta-data/mac", "must begin"),
            ("/latest", "must begin"),
            ("/latest/", "normalised"),
            ("/latest/meta-data/ma*", "normalised"),
            ("/latest/**", "normalised"),
            ("/latest/meta-data/*/x", "normalised"),
            ("/latest/meta-data//mac", "normalised"),
            ("/latest/meta-data/../user-data", "normalised"),
            ("/latest/meta-data/%6dac", "normalised"),
            ("/latest/meta-data/mac?x", "normalised"),
            ("/latest/user-data", "can't be opened"),
            ("/latest/user-data/*", "can't be opened"),
            ("/latest/api/token", "can't be opened"),
            ("/latest/meta-data/iam/*", "can't be opened"),
            ("/latest/meta-data/IAM/info", "can't be opened"),
            ("/latest/meta-data/iam/security-credentials/node", "can't be opened"),
            ("/latest/meta-data/identity-credentials/*", "can't be opened"),
            ("/latest/meta-data/managed-ssh-keys/*", "can't be opened"),
            ("/latest/meta-data/public-keys/0/openssh-key", "can't be opened"),
        ];
        for (text, expected) in bad {
            let error = text.parse::<AllowPath>().unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(text), "{text}: {error}");
        }
    }
}
