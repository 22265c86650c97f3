//! Parses a request line into a route.
//!
//! Repeated slashes are merged first, as in EC2, and one trailing slash is ignored. Beyond that a path is routed only in
//! its normalised spelling: paths with escapes, dot segments, or characters outside a small set get a 404. So there is one
//! spelling to decide about, and only that is requested from the real service. It is always requested below `/latest`,
//! where a path shows at most as much as below an older version.

use std::borrow::Cow;

use http::Method;

use super::{
    AllowPath, DenyPath, Error,
    paths::{self, is_denied},
};
use kiam_core::role::RoleArn;

/// The `Allow` header of paths that are read.
const READ: &str = "GET, HEAD";
/// The `Allow` header of the token's path.
const ISSUE: &str = "PUT";

/// The route of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `PUT /latest/api/token`.
    Token,
    /// `GET` or `HEAD` of a readable path.
    Read(Readable),
}

/// A readable path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The list of roles: the name of the pod's role.
    RoleName,
    /// Credentials of a role.
    Credentials(Form, RequestedRole),
    /// `iam/info`: an instance profile made of the pod's role.
    InstanceProfile,
    /// A list of paths that does not depend on the pod.
    Listing(&'static str),
    /// A path that the real service answers.
    Upstream(UpstreamPath),
}

/// The two forms of the credentials' body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `security-credentials`.
    Plain,
    /// `security-credentials-extended`, with the account.
    Extended,
}

/// The role in a path, as the client wrote it: a name, a path and name, or an ARN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestedRole(String);

/// A normalised path without a leading slash, which may be requested from the real service below `/latest/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamPath {
    path: String,
    lifetime: Lifetime,
}

/// How long an answer of the real service stays valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifetime {
    /// For the life of the instance.
    Instance,
    /// For a second: pods that ask at the same time share an answer.
    Moment,
    /// For one request.
    Request,
}

/// The paths that this agent answers.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    allowed: Vec<AllowPath>,
    denied: Vec<DenyPath>,
}

// === impl Routes ===

impl Routes {
    /// The open paths and those of `allowed`, without those of `denied`.
    #[must_use]
    pub fn new(allowed: Vec<AllowPath>, denied: Vec<DenyPath>) -> Self {
        Self { allowed, denied }
    }

    /// Parses `method` and `path`, the request target without its query.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] for a path that is not allowed or not normalised, [`Error::Method`], and [`Error::DatedToken`] for a
    /// token of a version other than `latest`, as in EC2.
    pub fn parse(&self, method: &Method, path: &str) -> Result<Route, Error> {
        let path = joined(path);
        let normalised = NormalisedPath::parse(&path);
        let is_token = normalised.is_some_and(|path| without_slash(path.rest) == "api/token");
        match *method {
            Method::GET | Method::HEAD if !is_token => {}
            Method::PUT if is_token => {
                let latest = normalised.is_some_and(|path| path.version == PathVersion::Latest);
                return if latest { Ok(Route::Token) } else { Err(Error::DatedToken) };
            }
            Method::PUT if normalised.is_none() => return Err(Error::Path),
            _ => return Err(Error::Method { allow: if is_token { ISSUE } else { READ } }),
        }
        let path = normalised.ok_or(Error::Path)?;
        let what = path.local().or_else(|| self.upstream(path.rest)).ok_or(Error::Path)?;
        Ok(Route::Read(what))
    }

    fn upstream(&self, rest: &str) -> Option<Readable> {
        if is_denied(rest) || self.denied.iter().any(|denied| denied.covers(rest)) {
            return None;
        }
        let (path, lifetime) = match paths::open(without_slash(rest)) {
            Some(open) => (open.path, open.lifetime),
            None => {
                let path = self.allowed.iter().find_map(|allowed| allowed.opened(rest))?;
                (path, Lifetime::Request)
            }
        };
        Some(Readable::Upstream(UpstreamPath { path: path.to_owned(), lifetime }))
    }
}

// === impl RequestedRole ===

impl RequestedRole {
    /// The text, which has only letters, digits and `-_.~+=,@:/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this names `role`: SDKs request the listed name, or one that is configured.
    #[must_use]
    pub fn names(&self, role: &RoleArn) -> bool {
        let text = self.as_str();
        text == role.name() || text == role.path_and_name() || text == role.as_ref()
    }
}

// === impl UpstreamPath ===

impl UpstreamPath {
    /// The region's name.
    #[must_use]
    pub fn region() -> Self {
        Self { path: "meta-data/placement/region".to_owned(), lifetime: Lifetime::Instance }
    }

    /// The path, which begins with neither slash nor version.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.path
    }

    /// How long the answer stays valid.
    #[must_use]
    pub fn lifetime(&self) -> Lifetime {
        self.lifetime
    }
}

// === NormalisedPath ===

/// A path in its only spelling: a version, and the rest.
///
/// It has only letters, digits, `-_.~+=,@:` and `/`. No segment is dots alone, and only the last may be empty.
#[derive(Clone, Copy, Debug)]
struct NormalisedPath<'a> {
    version: PathVersion,
    rest: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PathVersion {
    /// `/`: above all versions.
    None,
    Latest,
    /// `1.0`, or a day.
    Numbered,
}

impl<'a> NormalisedPath<'a> {
    fn parse(path: &'a str) -> Option<Self> {
        let path = path.strip_prefix('/')?;
        if path.is_empty() {
            return Some(Self { version: PathVersion::None, rest: "" });
        }
        let (version, rest) = path.split_once('/').unwrap_or((path, ""));
        let version = version_of(version)?;
        is_normalised(rest).then_some(Self { version, rest })
    }

    fn local(self) -> Option<Readable> {
        if self.version == PathVersion::None {
            return Some(Readable::Listing("latest"));
        }
        let iam = match without_slash(self.rest) {
            "" => return Some(Readable::Listing("meta-data")),
            "meta-data" => return Some(Readable::Listing("iam/\ninstance-id\nplacement/")),
            "meta-data/iam" => return Some(Readable::Listing("info\nsecurity-credentials/")),
            rest => rest.strip_prefix("meta-data/iam/")?,
        };
        let (form, after) = match iam.strip_prefix("security-credentials-extended") {
            Some(after) => (Form::Extended, after),
            None if iam == "info" => return Some(Readable::InstanceProfile),
            None => (Form::Plain, iam.strip_prefix("security-credentials")?),
        };
        if after.is_empty() {
            return Some(Readable::RoleName);
        }
        let role = after.strip_prefix('/')?;
        Some(Readable::Credentials(form, RequestedRole(role.to_owned())))
    }
}

/// `path` with repeated slashes merged.
fn joined(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut joined = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !joined.ends_with('/') {
            joined.push(character);
        }
    }
    Cow::Owned(joined)
}

/// `rest` without one trailing slash.
pub(super) fn without_slash(rest: &str) -> &str {
    rest.strip_suffix('/').unwrap_or(rest)
}

fn version_of(text: &str) -> Option<PathVersion> {
    let is_day = |text: &str| {
        text.len() == "YYYY-MM-DD".len()
            && text.bytes().enumerate().all(|(at, byte)| match at {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            })
    };
    match text {
        "latest" => Some(PathVersion::Latest),
        text if text == "1.0" || is_day(text) => Some(PathVersion::Numbered),
        _ => None,
    }
}

/// Whether `rest`, which follows a version and a slash, is normalised.
pub(super) fn is_normalised(rest: &str) -> bool {
    // Of the segment so far: whether it is empty, and whether it has dots alone.
    let (mut is_empty, mut is_dots) = (true, true);
    for byte in rest.bytes() {
        match byte {
            b'/' if is_dots => return false,
            b'/' => (is_empty, is_dots) = (true, true),
            b'.' => is_empty = false,
            _ if byte.is_ascii_alphanumeric() || b"-_~+=,@:".contains(&byte) => {
                (is_empty, is_dots) = (false, false);
            }
            _ => return false,
        }
    }
    // Only the last segment may be empty.
    is_empty || !is_dots
}

#[cfg(test)]
pub(super) mod corpus;
#[cfg(test)]
mod tests;
