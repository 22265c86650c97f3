//! `--allow-path` and `--deny-path`: the paths of the real service that pods may read, beside the open ones.

use std::str::FromStr;

use super::{
    paths::{COMMON, folded, is_denied, is_signature},
    route::{is_normalised, without_slash},
};
use kiam_core::role::QuotedText;

/// The word for [`COMMON`].
const COMMON_WORD: &str = "common";

/// A path of `--allow-path`: exact, everything below one (`/latest/meta-data/tags/*`), or `common`.
///
/// It is written below `/latest` and applies to every version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowPath(Extent);

/// A path of `--deny-path`, which denies it and everything below it, even if it is allowed or open by default.
///
/// It is written like an [`AllowPath`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenyPath(Vec<String>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Extent {
    Exact(String),
    /// Ends in a slash.
    Below(String),
    Common,
}

/// Why a text is not an [`AllowPath`] or a [`DenyPath`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// The path is not below `/latest/`.
    #[error("{0} must begin with /latest/ (it then applies to every version)")]
    Version(QuotedText),
    /// The path is not normalised, so that no request is routed to it.
    #[error(
        "{0} is not a normalised path: letters, digits and -_.~+=,@: in segments that are neither empty \
         nor dots, and at most one * as the whole last segment"
    )]
    Spelling(QuotedText),
    /// The path has data that belongs to the node alone.
    #[error("{0} can't be opened: it gives pods what belongs to the node alone")]
    Denied(QuotedText),
    /// Pods can never read the path of the real service.
    #[error("{0} need not be denied: pods can never read it from the real service")]
    NeverOpen(QuotedText),
}

// === impl AllowPath ===

impl AllowPath {
    /// The path to request from the real service, if this allows `rest`, a normalised path after its version.
    pub(super) fn opened<'a>(&'a self, rest: &'a str) -> Option<&'a str> {
        match &self.0 {
            Extent::Exact(path) => (without_slash(path) == without_slash(rest)).then_some(path),
            Extent::Below(folder) => below(folder, rest),
            Extent::Common => COMMON.into_iter().find_map(|path| match path.ends_with('/') {
                true => below(path, rest),
                false => (path == without_slash(rest)).then_some(path),
            }),
        }
    }
}

impl FromStr for AllowPath {
    type Err = InvalidPath;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == COMMON_WORD {
            return Ok(Self(Extent::Common));
        }
        let extent = extent(text)?;
        match &extent {
            Extent::Exact(path) | Extent::Below(path) if !path.is_empty() && is_denied(path) => {
                Err(InvalidPath::Denied(QuotedText::new(text)))
            }
            _ => Ok(Self(extent)),
        }
    }
}

// === impl DenyPath ===

impl DenyPath {
    /// Whether this denies `rest`, a normalised path after its version.
    pub(super) fn covers(&self, rest: &str) -> bool {
        folded(without_slash(rest)).starts_with(&self.0)
    }
}

impl FromStr for DenyPath {
    type Err = InvalidPath;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (Extent::Exact(path) | Extent::Below(path)) = extent(text)? else {
            return Err(InvalidPath::Version(QuotedText::new(text)));
        };
        match without_slash(&path) {
            "" => Ok(Self(Vec::new())),
            path if is_denied(path) => Err(InvalidPath::NeverOpen(QuotedText::new(text))),
            path => Ok(Self(folded(path))),
        }
    }
}

/// `rest`, if it is below `folder` or the list of `folder`.
fn below<'a>(folder: &str, rest: &'a str) -> Option<&'a str> {
    let list = !folder.is_empty() && rest == without_slash(folder);
    ((list || rest.starts_with(folder)) && !is_signature(rest)).then_some(rest)
}

fn extent(text: &str) -> Result<Extent, InvalidPath> {
    let quoted = || QuotedText::new(text);
    let rest = text.strip_prefix("/latest/").ok_or_else(|| InvalidPath::Version(quoted()))?;
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
        return Err(InvalidPath::Spelling(quoted()));
    }
    Ok(extent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allow_paths_are_checked_when_they_are_parsed() {
        let good = [
            "common",
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
            ("Common", "must begin"),
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

    #[test]
    fn what_is_denied_is_shut_with_all_that_is_below_it() {
        let cases = [
            ("/latest/meta-data/spot", "meta-data/spot/instance-action", true),
            ("/latest/meta-data/spot/", "meta-data/spot/instance-action", true),
            ("/latest/meta-data/spot/*", "meta-data/spot/instance-action", true),
            ("/latest/meta-data/spot/*", "meta-data/spot", true),
            ("/latest/meta-data/spot", "meta-data/Spot/instance-action/", true),
            ("/latest/meta-data/spot", "meta-data/spots", false),
            ("/latest/meta-data/mac", "meta-data/mac/", true),
            ("/latest/meta-data/mac", "meta-data/mac.", true),
            ("/latest/meta-data/mac", "meta-data/macs", false),
            ("/latest/*", "meta-data/mac", true),
            ("/latest/*", "dynamic/x", true),
        ];
        for (denied, rest, covered) in cases {
            assert_eq!(
                denied.parse::<DenyPath>().unwrap().covers(rest),
                covered,
                "{denied} {rest}"
            );
        }
        for (text, expected) in [
            ("common", "must begin"),
            ("/latest/", "normalised"),
            ("/latest/meta-data//mac", "normalised"),
            ("/latest/user-data", "need not be denied"),
            ("/latest/meta-data/iam/info", "need not be denied"),
        ] {
            let error = text.parse::<DenyPath>().unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(text), "{text}: {error}");
        }
    }
}
