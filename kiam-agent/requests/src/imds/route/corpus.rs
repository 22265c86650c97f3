//! Odd spellings of paths: a table of them, and a generator.

use std::fmt;

/// A request target, and what should become of it.
pub(in crate::imds) struct Spelling {
    pub(in crate::imds) outcome: Outcome,
    pub(in crate::imds) target: Vec<u8>,
    line: String,
}

pub(in crate::imds) enum Outcome {
    /// Answered from what the agent holds.
    Ours,
    /// Refused so.
    Status(String),
    /// The real service is asked for exactly this.
    Upstream(String),
}

impl fmt::Display for Spelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

/// The table.
pub(in crate::imds) fn spellings() -> Vec<Spelling> {
    let lines = include_str!("spellings.txt").lines();
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let spelling = |line: &str| {
        let (outcome, target) = line.split_once(' ').unwrap();
        let outcome = match outcome {
            "ours" => Outcome::Ours,
            path if path.starts_with('/') => Outcome::Upstream(path.to_owned()),
            status => Outcome::Status(status.to_owned()),
        };
        Spelling { outcome, target: unescaped(target), line: line.to_owned() }
    };
    lines.map(spelling).collect()
}

fn unescaped(text: &str) -> Vec<u8> {
    let mut pieces = text.split("\\x");
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        bytes.push(u8::from_str_radix(&piece[..2], 16).unwrap());
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    bytes
}

/// Paths that mutations begin with.
const KNOWN: [&str; 28] = [
    "/",
    "/latest/",
    "/latest/meta-data/",
    "/latest/meta-data/mac",
    "/latest/meta-data/tags/instance/",
    "/latest/meta-data/placement/region",
    "/latest/meta-data/iam/info",
    "/latest/meta-data/iam/security-credentials/",
    "/latest/meta-data/iam/security-credentials/reader",
    "/latest/meta-data/iam/security-credentials-extended/reader",
    "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
    "/latest/meta-data/managed-ssh-keys/signer-cert",
    "/latest/meta-data/public-keys/0/openssh-key",
    "/latest/dynamic/instance-identity/document",
    "/latest/dynamic/instance-identity/document/",
    "/latest/dynamic/instance-identity/rsa2048",
    "/latest/meta-data/spot/instance-action",
    "/latest/meta-data/instance-id/",
    "//latest/meta-data//iam//security-credentials//reader/",
    "//latest//user-data/",
    "/latest//meta-data//identity-credentials//ec2/",
    "/latest/dynamic/fws/instance-monitoring",
    "/latest/user-data",
    "/latest/api/token",
    "/1.0/user-data",
    "/2024-04-11/meta-data/iam/security-credentials/reader",
    "/2024-04-11/user-data",
    "http://169.254.169.254/latest/user-data",
];

/// What mutations put in.
const PIECES: [&[u8]; 38] = [
    b"/",
    b"//",
    b"/./",
    b"/../",
    b"/..",
    b".",
    b"..",
    b"...",
    b";",
    b";x=1",
    b"\\",
    b"%2f",
    b"%2F",
    b"%252f",
    b"%5c",
    b"%2e",
    b"%2e%2e/",
    b"%252e",
    b"%00",
    b"%",
    b"%2",
    b"?",
    b"#",
    b"*",
    b"&",
    b"=",
    b"@",
    b":",
    b"~",
    b"\xc3\xa9",
    b"\xc0\xae",
    b"\xc0\xaf",
    b"\xff",
    b"\xe2\x80\x8b",
    b"\x01",
    b"latest",
    b"meta-data/",
    b"iam/security-credentials/",
];

/// A known path with a few changes that a lenient server might undo, or a careless filter not see through.
pub(in crate::imds) fn mutated(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut path = random.choice(KNOWN).unwrap().as_bytes().to_vec();
    for _ in 0..random.usize(0..4) {
        mutate(random, &mut path);
    }
    // Only one request can be made of it, and one without a target is none.
    path.retain(|byte| !b" \r\n\t".contains(byte));
    if path.is_empty() { b"/".to_vec() } else { path }
}

fn mutate(random: &mut fastrand::Rng, path: &mut Vec<u8>) {
    let at = random.usize(..=path.len());
    match random.u8(..9) {
        0 | 1 => drop(path.splice(at..at, random.choice(PIECES).unwrap().iter().copied())),
        // One byte percent-encoded, once or twice, in either case.
        2 if at < path.len() => {
            let byte = path[at];
            let encoded = match random.u8(..4) {
                0 => format!("%{byte:02x}"),
                1 => format!("%{byte:02X}"),
                2 => format!("%25{byte:02x}"),
                _ => format!("%u00{byte:02x}"),
            };
            path.splice(at..=at, encoded.into_bytes());
        }
        3 if at < path.len() => path[at] ^= 0x20,
        4 if at < path.len() => drop(path.remove(at)),
        5 => path.truncate(at),
        6 => path.iter_mut().filter(|byte| **byte == b'/').for_each(|byte| *byte = b'\\'),
        7 => {
            let other = random.choice(KNOWN).unwrap().as_bytes();
            path.extend_from_slice(other);
        }
        8 => {
            let other = random.choice(KNOWN).unwrap().as_bytes();
            *path = [
                other,
                b"/..".repeat(other.iter().filter(|b| **b == b'/').count()).as_slice(),
                path.as_slice(),
            ]
            .concat();
        }
        _ => path.push(random.u8(..)),
    }
}

/// The segments of `path` that are not empty.
pub(super) fn joined(path: &str) -> String {
    path.split('/').filter(|segment| !segment.is_empty()).collect::<Vec<_>>().join("/")
}

/// Whether the answer of `path` is kept, so that it may not be asked for again.
pub(in crate::imds) fn is_kept(path: &str) -> bool {
    ["/placement/", "/instance-id", "/instance-identity/", "/spot/", "/events/", "/autoscaling/"]
        .iter()
        .any(|part| path.contains(part))
}

/// What the most lenient of servers would take `path` for: decoded until nothing changes, back slashes for
/// slashes, without parameters, dot segments and empty segments, in lower case.
fn understood(path: &str) -> Vec<String> {
    let mut bytes = path.as_bytes().to_vec();
    for _ in 0..4 {
        bytes = decoded(&bytes);
    }
    let text = String::from_utf8_lossy(&bytes).to_lowercase().replace('\\', "/");
    let text = text.split(['?', '#', '\0']).next().unwrap_or_default().to_owned();
    let mut segments = Vec::new();
    for segment in text.split('/').map(|it| it.split(';').next().unwrap_or_default()) {
        match segment.trim_matches(['.', ' ']) {
            "" if segment == ".." => drop(segments.pop()),
            "" => {}
            name => segments.push(name.to_owned()),
        }
    }
    segments
}

fn decoded(bytes: &[u8]) -> Vec<u8> {
    let digits = |at: usize| {
        let text = std::str::from_utf8(bytes.get(at + 1..at + 3)?).ok()?;
        u8::from_str_radix(text, 16).ok()
    };
    let mut out = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digits(at)) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    out
}

/// Whether the real service may be asked for `path`, below `/latest/`, when everything is allowed that can be.
/// Judged by other means than the router's.
pub(in crate::imds) fn may_be_forwarded(path: &str) -> bool {
    let only_spelling =
        path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~+=,@:/".contains(&b))
            && !path.starts_with('/')
            && !path.split('/').any(|segment| [".", ".."].contains(&segment))
            && !path.contains("//");
    only_spelling && !is_nodes_own(path)
}

/// Whether `path`, below a version, is what belongs to the node alone.
pub(super) fn is_nodes_own(path: &str) -> bool {
    let segments = understood(path);
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    match segments.as_slice() {
        ["meta-data", "iam" | "identity-credentials" | "managed-ssh-keys" | "public-keys", ..] => {
            true
        }
        ["meta-data", ..] => false,
        ["dynamic", "instance-identity", "document"] => !path.ends_with("document"),
        ["dynamic", "instance-identity", _, ..] => true,
        ["dynamic", ..] => false,
        _ => true,
    }
}
