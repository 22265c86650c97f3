//! From a request line to what is asked for.
//!
//! Slashes in a row are joined first, as EC2 does, and one slash at the end changes nothing. Beyond that a
//! path is routed only in its normalised spelling: whatever decoding, dot segments or characters outside a
//! small set could change is no path of ours (404). So there is one spelling to decide about, and it alone
//! is asked of the real service, always below `/latest`, where it says at most what the same path says
//! below an older version.

use std::borrow::Cow;

use http::Method;

use super::{
    AllowPath, DenyPath, Error,
    paths::{self, is_denied},
};
use kiam_core::role::RoleArn;

/// `Allow` of everything that is read.
const READ: &str = "GET, HEAD";
/// `Allow` of the token's path.
const ISSUE: &str = "PUT";

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `PUT /latest/api/token`.
    Token,
    /// `GET` or `HEAD` of one of the paths that are answered.
    Read(Readable),
}

/// What can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The list of roles: the name of the pod's role.
    RoleName,
    /// Credentials of a role.
    Credentials(Form, RequestedRole),
    /// `iam/info`: the instance profile, which is made up from the pod's role.
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
    /// `security-credentials-extended`: names the account too.
    Extended,
}

/// The role that a path names, as the client wrote it: a name, a path and name, or an ARN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestedRole(String);

/// A normalised path, without leading slash, that the real service may be asked for below `/latest/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamPath {
    path: String,
    lifetime: Lifetime,
}

/// How long an answer of the real service is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifetime {
    /// As long as the instance lives.
    Instance,
    /// A second: pods that ask at once share an answer.
    Moment,
    /// Until it is asked again.
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
    /// The paths that are open by default and those of `allowed`, without those of `denied`.
    #[must_use]
    pub fn new(allowed: Vec<AllowPath>, denied: Vec<DenyPath>) -> Self {
        Self { allowed, denied }
    }

    /// What `method` on `path`, the request target without its query, asks for.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] for what is not ours or not normalised, [`Error::Method`], and
    /// [`Error::DatedToken`] for a token of a version other than `latest`, as EC2 has it.
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
    /// The text; it has letters, digits and `-_.~+=,@:/` only.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it names `role`: SDKs ask for what they were listed, or for what their users configured.
    #[must_use]
    pub fn names(&self, role: &RoleArn) -> bool {
        [role.name(), role.path_and_name(), role.as_ref()].contains(&self.as_str())
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

    /// How long its answer is true.
    #[must_use]
    pub fn lifetime(&self) -> Lifetime {
        self.lifetime
    }
}

// === NormalisedPath ===

/// A path in its only spelling: a version, and what follows it.
///
/// Its characters are letters, digits and `-_.~+=,@:`, and `/`; no segment is dots alone, and none is
/// empty but the last.
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

/// `path` with one slash for each run of them.
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

/// `rest` without the one slash that may end it.
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

/// Whether `rest`, which follows a version and a slash, is its own only spelling.
pub(super) fn is_normalised(rest: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~+=,@:/".contains(&byte);
    let mut segments = rest.split('/').peekable();
    while let Some(segment) = segments.next() {
        let empty = segment.is_empty() && (segments.peek().is_some() || rest.len() == 1);
        let dots = !segment.is_empty() && segment.bytes().all(|byte| byte == b'.');
        if empty || dots {
            return false;
        }
    }
    rest.bytes().all(known)
}

#[cfg(test)]
pub(super) mod corpus;
#[cfg(test)]
mod tests;
