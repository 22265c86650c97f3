//! The identities that pods request, and the pods that request each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use super::RoleIdentity;

/// A pod that requests an identity, as far as it counts for sharing calls to STS among pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claimant {
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod's UID: a later pod of the same name is another one.
    pub pod: Arc<str>,
}

/// The wanted set: the identities that the node's pods request and are allowed, with the pods that request each.
pub type WantedRoles = Arc<BTreeMap<RoleIdentity, BTreeSet<Claimant>>>;

/// The number of sessions that a wanted set needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sessions {
    /// Pods that request a role.
    pub pods: usize,
    /// Different roles. As many sessions would be enough without sessions per pod.
    pub roles: usize,
    /// Different identities.
    pub sessions: usize,
}

// === impl Claimant ===

impl Claimant {
    /// The pod with this UID.
    #[must_use]
    pub fn new(namespace: &str, pod: &str) -> Self {
        Self { namespace: namespace.into(), pod: pod.into() }
    }
}

// === impl Sessions ===

impl Sessions {
    /// Counts `wanted`.
    #[must_use]
    pub fn of(wanted: &WantedRoles) -> Self {
        let roles: BTreeSet<_> = wanted.keys().map(|identity| &identity.role).collect();
        let pods: BTreeSet<_> = wanted.values().flatten().collect();
        Self { pods: pods.len(), roles: roles.len(), sessions: wanted.len() }
    }
}

impl fmt::Display for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pods, roles, sessions } = self;
        write!(f, "{pods} pods with {roles} roles need {sessions} sessions instead of {roles}")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::role::SessionName;

    #[test]
    fn sessions_are_counted_beside_the_roles_that_they_are_of() {
        let identity = |role: u32, session: u32| {
            let role = format!("arn:aws:iam::123456789012:role/r{role}").parse().unwrap();
            let name = SessionName::sanitised(&format!("s{session}"));
            RoleIdentity::new(role, name, Duration::from_secs(3600))
        };
        let pods = |pods: &[&str]| pods.iter().map(|pod| Claimant::new("n", pod)).collect();
        let wanted = [
            (identity(1, 1), pods(&["a", "b"])),
            (identity(1, 2), pods(&["c"])),
            (identity(2, 1), pods(&["d"])),
        ];
        let sessions = Sessions::of(&Arc::new(BTreeMap::from(wanted)));
        assert_eq!(sessions, Sessions { pods: 4, roles: 2, sessions: 3 });
        assert_eq!(sessions.to_string(), "4 pods with 2 roles need 3 sessions instead of 2");
    }
}
