//! The programs of kiam and kube2iam, and sets of their releases.

use std::fmt;

/// A program that has flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// kiam v1, one program.
    Kiam,
    /// `kiam agent`, of v2 to v4; in v2 a program `agent`.
    Agent,
    /// `kiam server`.
    Server,
    /// `kiam health`, which probes run.
    Health,
    /// kube2iam, of all versions and forks.
    Kube2iam,
}

/// A set of releases.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Releases(u16);

/// The members, in the order of their bits.
const MEMBERS: [(Program, u8); 11] = [
    (Program::Kiam, 1),
    (Program::Agent, 2),
    (Program::Agent, 3),
    (Program::Agent, 4),
    (Program::Server, 2),
    (Program::Server, 3),
    (Program::Server, 4),
    (Program::Health, 2),
    (Program::Health, 3),
    (Program::Health, 4),
    (Program::Kube2iam, 0),
];

// === impl Program ===

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kiam => "kiam",
            Self::Agent => "agent",
            Self::Server => "server",
            Self::Health => "health",
            Self::Kube2iam => "kube2iam",
        })
    }
}

// === impl Releases ===

impl Releases {
    /// kiam v1.
    pub const KIAM_1: Self = Self(1);
    /// `kiam agent` v3.
    pub const AGENT_3: Self = Self(1 << 2);
    /// `kiam agent` v4.
    pub const AGENT_4: Self = Self(1 << 3);
    /// `kiam agent`, all versions.
    pub const AGENT: Self = Self(0b111 << 1);
    /// `kiam server` v3.
    pub const SERVER_3: Self = Self(1 << 5);
    /// `kiam server` v4.
    pub const SERVER_4: Self = Self(1 << 6);
    /// `kiam server`, all versions.
    pub const SERVER: Self = Self(0b111 << 4);
    /// `kiam health` v3.
    pub const HEALTH_3: Self = Self(1 << 8);
    /// `kiam health` v4.
    pub const HEALTH_4: Self = Self(1 << 9);
    /// `kiam health`, all versions.
    pub const HEALTH: Self = Self(0b111 << 7);
    /// kube2iam.
    pub const KUBE2IAM: Self = Self(1 << 10);
    /// All versions of `kiam agent` and `kiam server` that have StatsD.
    pub const STATSD: Self = Self(0b11 << 1 | 0b11 << 4);

    /// These releases and `others`.
    #[must_use]
    pub const fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// The releases of `program`: all, or those of one `major` version of kiam.
    #[must_use]
    pub fn of(program: Program, major: Option<u8>) -> Self {
        let member = |&(_, (its, version)): &(usize, (Program, u8))| {
            its == program && (version == 0 || major.is_none_or(|major| major == version))
        };
        let members = MEMBERS.into_iter().enumerate().filter(member);
        Self(members.fold(0, |set, (bit, _)| set | 1 << bit))
    }

    /// Whether a release is in both sets.
    #[must_use]
    pub fn intersects(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// The releases in the set.
    pub fn iter(self) -> impl Iterator<Item = (Program, u8)> {
        let present = move |&(bit, _): &(usize, (Program, u8))| self.0 & (1 << bit) != 0;
        MEMBERS.into_iter().enumerate().filter(present).map(|(_, member)| member)
    }
}

impl fmt::Debug for Releases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
