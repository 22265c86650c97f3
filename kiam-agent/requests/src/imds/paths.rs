//! The paths of the real service that pods may read, and those that can't be opened.
//!
//! `docs/paths.md` has the reason for each path; a test compares it with the tables here.

use super::route::{Lifetime, without_slash};

/// A path that every pod may read, unless `--deny-path` denies it.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenPath {
    /// The path below a version.
    pub(super) path: &'static str,
    pub(super) lifetime: Lifetime,
}

/// The open paths: the instance's location and type, and its coming end. None of them is a secret.
pub(super) const OPEN: [OpenPath; 9] = [
    fixed("dynamic/instance-identity/document"),
    fixed("meta-data/instance-id"),
    fixed("meta-data/placement/availability-zone"),
    fixed("meta-data/placement/availability-zone-id"),
    fixed("meta-data/placement/region"),
    // A 404 means "no interruption" to termination handlers, so denying these paths would silently disable them.
    passing("meta-data/autoscaling/target-lifecycle-state"),
    passing("meta-data/events/recommendations/rebalance"),
    passing("meta-data/spot/instance-action"),
    passing("meta-data/spot/termination-time"),
];

/// The paths of `--allow-path=common`: those that widely used programs request, without secrets. A path that ends in a
/// slash includes everything below it, and its list.
pub(super) const COMMON: [&str; 22] = [
    "meta-data/ami-id",
    "meta-data/ami-launch-index",
    "meta-data/block-device-mapping/",
    "meta-data/events/maintenance/",
    "meta-data/hostname",
    "meta-data/instance-life-cycle",
    "meta-data/instance-type",
    "meta-data/ipv6",
    "meta-data/local-hostname",
    "meta-data/local-ipv4",
    "meta-data/mac",
    "meta-data/network/interfaces/macs/",
    "meta-data/outpost-arn",
    "meta-data/placement/",
    "meta-data/product-codes",
    "meta-data/profile",
    "meta-data/public-hostname",
    "meta-data/public-ipv4",
    "meta-data/reservation-id",
    "meta-data/security-groups",
    "meta-data/services/",
    "meta-data/system",
];

const fn fixed(path: &'static str) -> OpenPath {
    OpenPath { path, lifetime: Lifetime::Instance }
}

const fn passing(path: &'static str) -> OpenPath {
    OpenPath { path, lifetime: Lifetime::Moment }
}

/// The open path of `rest`, which has no trailing slash.
pub(super) fn open(rest: &str) -> Option<OpenPath> {
    OPEN.into_iter().find(|open| open.path == rest)
}

/// Whether `rest` can't be opened, because its data belongs to the node alone.
pub(super) fn is_denied(rest: &str) -> bool {
    match folded(rest).as_slice() {
        [first, second, ..] if first == "meta-data" => {
            ["iam", "identity-credentials", "managed-ssh-keys", "public-keys"]
                .contains(&second.as_str())
        }
        [first, ..] if first == "meta-data" || first == "dynamic" => false,
        // `user-data`, `api`, and future paths.
        _ => true,
    }
}

/// Whether `rest` is or may be a signature of the instance's identity (`pkcs7`, `signature`, `rsa2048`). With one a pod can
/// impersonate the node, so only an exact path opens it. The document alone proves nothing.
pub(super) fn is_signature(rest: &str) -> bool {
    let inside = matches!(
        folded(rest).as_slice(),
        [first, second, _, ..] if first == "dynamic" && second == "instance-identity"
    );
    inside && without_slash(rest) != "dynamic/instance-identity/document"
}

/// The segments in lower case and without dots at their ends, in case the real service is more lenient than known.
pub(super) fn folded(rest: &str) -> Vec<String> {
    rest.split('/').map(|segment| segment.trim_matches('.').to_ascii_lowercase()).collect()
}
