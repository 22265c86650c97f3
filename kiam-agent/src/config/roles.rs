//! The flags of pods' roles and their sessions.

use super::{SECOND, flags::Flags, given, values::Mistakes};
use crate::sts::CHAINED;
use kiam_core::{
    policy::{self, NamespacePolicy},
    role::{BaseArn, Location, PolicyArn, RoleResolver, SessionPolicies, TagTemplate},
};

/// The configuration of pods' roles and their sessions.
#[derive(Clone, Debug)]
pub struct Roles {
    /// The base of short role names.
    pub base: Base,
    /// The rest, without a base and as for `--credential-source=node`.
    pub policy: policy::Config,
}

/// The base of short role names.
#[derive(Clone, Debug)]
pub enum Base {
    /// `--role-base-arn`.
    Given(BaseArn),
    /// `--role-base-arn-autodetect`.
    Autodetect,
    /// Neither: only full ARNs are valid, as ServiceAccounts have them with web identity.
    Absent,
}

/// The [`Roles`]; `None` if a mistake leaves a part out.
pub(super) fn roles(flags: &Flags, mistakes: &mut Mistakes) -> Option<Roles> {
    let base = base(flags, mistakes);
    let words = [("optional", NamespacePolicy::Optional), ("required", NamespacePolicy::Required)];
    let namespaces = mistakes.one_of("namespace-policy", &flags.namespace_policy, &words);
    let overrides = mistakes.overrides("annotation-overrides", &flags.annotation_overrides);
    let location = location(flags, mistakes);
    let session_name = mistakes.template("session-name", &flags.session_name, &location);
    let source_identity = flags
        .source_identity
        .as_ref()
        .map(|it| mistakes.template("source-identity", it, &location));
    let tags = mistakes.ok("session-tags", TagTemplate::parse(&flags.session_tags, &location));
    let policies: Option<Vec<PolicyArn>> =
        flags.session_policy.iter().map(|text| mistakes.parse("session-policy", text)).collect();
    let policies =
        mistakes.ok("session-policy", SessionPolicies::new(policies.unwrap_or_default()));
    let (least, most) = (SECOND * 900, SECOND * 43_200);
    let session_duration =
        mistakes.duration("session-duration", &flags.session_duration, least, most);
    if flags.assume_role_arn.is_some() && session_duration.is_some_and(|it| it > CHAINED) {
        mistakes.add("session-duration", "with --assume-role-arn sessions last at most 1h");
    }
    let policy = policy::Config {
        namespaces: namespaces?,
        overrides,
        session_name: session_name?,
        source_identity: given(source_identity)?,
        tags: tags?,
        policies: policies?,
        session_duration: session_duration?,
        ..policy::Config::new(RoleResolver::new(None))
    };
    Some(Roles { base: base?, policy })
}

/// The values of `{node}` and `{cluster}`.
fn location(flags: &Flags, mistakes: &mut Mistakes) -> Location {
    let cluster = flags.cluster_name.as_ref().map(|text| mistakes.parse("cluster-name", text));
    Location {
        node: flags.node_name.clone().filter(|name| !name.is_empty()),
        cluster: cluster.flatten(),
    }
}

fn base(flags: &Flags, mistakes: &mut Mistakes) -> Option<Base> {
    let autodetect = mistakes.switch("role-base-arn-autodetect", &flags.role_base_arn_autodetect);
    match (&flags.role_base_arn, autodetect) {
        (Some(_), true) => {
            mistakes.add("role-base-arn", "leave it out, or leave --role-base-arn-autodetect out");
            None
        }
        (Some(text), false) => mistakes.parse("role-base-arn", text).map(Base::Given),
        (None, true) => Some(Base::Autodetect),
        (None, false) if flags.credential_source == "web-identity" => Some(Base::Absent),
        (None, false) => {
            let problem = "it is required, such as arn:aws:iam::123456789012:role/, or --role-base-arn-autodetect";
            mistakes.add("role-base-arn", problem);
            None
        }
    }
}
