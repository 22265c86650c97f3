//! Templates of session names, such as `{namespace}.{pod}`.
//!
//! Trust policies and CloudTrail use the names. So the one rule is that subjects that differ in a placeholder never have
//! the same name, and that no annotation makes a name that a template makes.

use std::{fmt, str::FromStr};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

use super::{
    InvalidSessionName, QuotedText, SessionName,
    arn::is_name_byte,
    session::{SESSION_NAME_LENGTH, SESSION_PREFIX},
};

/// Marks names that are shortened or chosen by annotation. No template with placeholders has it, nor has any name in
/// Kubernetes.
const MARK: char = '=';

/// Bytes of the hash that are kept: 72 bits, so that nobody finds a second pod with the same hash.
const HASH_BYTES: usize = 9;
/// The same in characters of base64.
const HASH_LENGTH: usize = HASH_BYTES.div_ceil(3) * 4;
/// Characters left of 64 beside the mark and the hash.
const READABLE_LENGTH: usize = *SESSION_NAME_LENGTH.end() - 1 - HASH_LENGTH;

/// A cluster's name (`--cluster-name`): 1 to 100 of `A-Z a-z 0-9 . _ -`, which holds EKS's names and DNS names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterName(String);

/// Text that is not a cluster's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cluster's name is 1 to 100 of A-Z a-z 0-9 . _ -")]
pub struct InvalidClusterName;

/// The node and the cluster that the agent runs in, as configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// `--node-name`.
    pub node: Option<String>,
    /// `--cluster-name`.
    pub cluster: Option<ClusterName>,
}

/// The pod that a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod's name.
    pub pod: &'a str,
    /// The pod's UID.
    pub uid: &'a str,
    /// The pod's service account.
    pub service_account: &'a str,
}

/// A parsed template of session names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameTemplate {
    pieces: Vec<Piece>,
    /// Whether the name determines the values.
    unambiguous: bool,
}

/// Text that is not a template of session names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTemplate {
    /// Text without placeholders must be a session name.
    #[error(transparent)]
    Name(#[from] InvalidSessionName),
    /// A brace is unmatched.
    #[error("a brace is unmatched: placeholders are written {{pod}}")]
    Brace,
    /// There is no such placeholder.
    #[error(
        "there is no placeholder {0}: they are {{namespace}}, {{pod}}, {{service_account}}, {{node}} and {{cluster}}"
    )]
    Unknown(QuotedText),
    /// `{node}` without `--node-name`.
    #[error("{{node}} needs --node-name")]
    NoNode,
    /// `{cluster}` without `--cluster-name`.
    #[error("{{cluster}} needs --cluster-name")]
    NoCluster,
    /// A character beside the placeholders is invalid.
    #[error(
        "beside placeholders a template has A-Z a-z 0-9 _ + , . @ - and no =, which marks names that are shortened or chosen by annotation"
    )]
    Character,
    /// The text beside the placeholders leaves no room for them.
    #[error("beside placeholders a template has at most {READABLE_LENGTH} characters")]
    Length,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Value(Field),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Field {
    Namespace,
    Pod,
    ServiceAccount,
    Node(String),
    Cluster(String),
}

// === impl ClusterName ===

impl FromStr for ClusterName {
    type Err = InvalidClusterName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if (1..=100).contains(&text.len()) && text.bytes().all(good) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidClusterName)
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl NameTemplate ===

impl NameTemplate {
    /// Parses `text`; `location` has the values of `{node}` and `{cluster}`.
    ///
    /// # Errors
    ///
    /// [`InvalidTemplate`].
    pub fn parse(text: &str, location: &Location) -> Result<Self, InvalidTemplate> {
        if !text.contains(['{', '}']) {
            return Ok(Self::from(text.parse::<SessionName>()?));
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((literal, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').ok_or(InvalidTemplate::Brace)?;
            push_literal(&mut pieces, literal)?;
            pieces.push(Piece::Value(Field::parse(name, location)?));
            rest = after;
        }
        push_literal(&mut pieces, rest)?;
        let literals = pieces.iter().map(|piece| match piece {
            Piece::Literal(text) => text.len(),
            Piece::Value(_) => 0,
        });
        if literals.sum::<usize>() > READABLE_LENGTH {
            return Err(InvalidTemplate::Length);
        }
        let unambiguous = is_unambiguous(&pieces);
        Ok(Self { pieces, unambiguous })
    }

    /// Whether different pods may have different names.
    #[must_use]
    pub fn varies(&self) -> bool {
        let of_pod = |piece: &Piece| {
            matches!(piece, Piece::Value(Field::Namespace | Field::Pod | Field::ServiceAccount))
        };
        self.pieces.iter().any(of_pod)
    }

    /// The session name of `subject`: the filled-in template where that is unambiguous, else as much of it as there is
    /// room for, with a hash of the exact values.
    #[must_use]
    pub fn name(&self, subject: &Subject<'_>) -> SessionName {
        let mut text = String::new();
        let mut exact = self.unambiguous;
        let mut hash = Sha256::new();
        for piece in &self.pieces {
            match piece {
                Piece::Literal(literal) => text.push_str(literal),
                Piece::Value(field) => {
                    let value = field.of(subject);
                    exact &= !value.is_empty() && value.bytes().all(|byte| field.may_hold(byte));
                    hash.update((value.len() as u64).to_le_bytes());
                    hash.update(value);
                    text.push_str(value);
                }
            }
        }
        if exact && SESSION_NAME_LENGTH.contains(&text.len()) {
            return SessionName::sanitised(&text);
        }
        let readable: String = text.chars().take(READABLE_LENGTH).map(without_mark).collect();
        let hash = BASE64_URL_SAFE_NO_PAD.encode(&hash.finalize()[..HASH_BYTES]);
        SessionName::sanitised(&format!("{readable}{MARK}{hash}"))
    }

    /// The session name of a pod whose annotation is `text`.
    ///
    /// Without placeholders it is kiam's: `kiam-` and the text, unless that is the name that all other pods have.
    /// Otherwise it has the template's beginning and the text between two marks, so that it is no name that
    /// [`NameTemplate::name`] makes for any pod, and neither begins nor ends as one.
    #[must_use]
    pub fn chosen(&self, text: &str) -> SessionName {
        let prefix = match self.pieces.as_slice() {
            [Piece::Literal(literal)] => {
                let name = SessionName::sanitised(&format!("{SESSION_PREFIX}{text}"));
                if name.as_ref() != literal {
                    return name;
                }
                SESSION_PREFIX
            }
            [Piece::Literal(literal), ..] => literal,
            _ => SESSION_PREFIX,
        };
        let room = *SESSION_NAME_LENGTH.end() - prefix.len() - 2;
        let text: String = text.chars().take(room).map(without_mark).collect();
        SessionName::sanitised(&format!("{prefix}{MARK}{text}{MARK}"))
    }
}

impl From<SessionName> for NameTemplate {
    /// The template that makes this name for all pods.
    fn from(name: SessionName) -> Self {
        Self { pieces: vec![Piece::Literal(name.to_string())], unambiguous: true }
    }
}

fn push_literal(pieces: &mut Vec<Piece>, text: &str) -> Result<(), InvalidTemplate> {
    if text.contains('}') {
        return Err(InvalidTemplate::Brace);
    }
    if text.contains(MARK) || !text.bytes().all(is_name_byte) {
        return Err(InvalidTemplate::Character);
    }
    if !text.is_empty() {
        pieces.push(Piece::Literal(text.to_owned()));
    }
    Ok(())
}

fn without_mark(c: char) -> char {
    if c == MARK { '-' } else { c }
}

/// Whether no two sets of values render alike. Literals, and values that are delimited by a literal with a character
/// that they can't have, are removed from both ends. Then at most one value must be left.
fn is_unambiguous(mut pieces: &[Piece]) -> bool {
    use Piece::{Literal, Value};
    let apart = |field: &Field, byte: Option<u8>| byte.is_some_and(|byte| !field.may_hold(byte));
    loop {
        pieces = match pieces {
            [] | [_] => return true,
            [Literal(_), rest @ ..] | [rest @ .., Literal(_)] => rest,
            [Value(field), Literal(after), rest @ ..] if apart(field, after.bytes().next()) => rest,
            [rest @ .., Literal(before), Value(field)] if apart(field, before.bytes().last()) => {
                rest
            }
            _ => return false,
        }
    }
}

// === impl Field ===

impl Field {
    fn parse(name: &str, location: &Location) -> Result<Self, InvalidTemplate> {
        match name {
            "namespace" => Ok(Self::Namespace),
            "pod" => Ok(Self::Pod),
            "service_account" => Ok(Self::ServiceAccount),
            "node" => location.node.clone().map(Self::Node).ok_or(InvalidTemplate::NoNode),
            "cluster" => {
                let cluster = location.cluster.as_ref().ok_or(InvalidTemplate::NoCluster)?;
                Ok(Self::Cluster(cluster.0.clone()))
            }
            _ => Err(InvalidTemplate::Unknown(QuotedText::new(&format!("{{{name}}}")))),
        }
    }

    fn of<'a>(&'a self, subject: &Subject<'a>) -> &'a str {
        match self {
            Self::Namespace => subject.namespace,
            Self::Pod => subject.pod,
            Self::ServiceAccount => subject.service_account,
            Self::Node(value) | Self::Cluster(value) => value,
        }
    }

    /// Whether a value may have this character: a namespace is a DNS label; pods, service accounts and nodes are DNS
    /// subdomains.
    /// <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>
    fn may_hold(&self, byte: u8) -> bool {
        let label = byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        match self {
            Self::Namespace => label,
            Self::Pod | Self::ServiceAccount | Self::Node(_) => label || byte == b'.',
            Self::Cluster(_) => label || byte.is_ascii_uppercase() || b"._".contains(&byte),
        }
    }
}

#[cfg(test)]
mod tests;
