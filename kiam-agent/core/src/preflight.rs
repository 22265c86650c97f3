//! What `kiam-agent preflight` reports: one [`Check`] for each [`Topic`].

use std::fmt;

use serde::Serialize;

/// The result of a check.
///
/// A check that could not be made is `Unknown`, and never a guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is lacking.
    Ok,
    /// The check could not be made.
    Unknown,
    /// The agent runs, and somebody should know this.
    Warn,
    /// The agent does not run here, or does not keep pods from the node's credentials.
    Fail,
}

/// A checked property of the node, with what was found and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was checked.
    pub topic: Topic,
    /// The result.
    pub verdict: Verdict,
    /// What was found, and what it means.
    pub finding: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

/// Defines [`Topic`], so that no topic lacks a name or is left out of [`Topic::ALL`].
macro_rules! topics {
    ($($variant:ident $name:literal $about:literal;)+) => {
        /// A property of the node, of what is around it, or of the configuration.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Topic {
            $(#[doc = $about] $variant,)+
        }

        impl Topic {
            /// All topics, in the order of the report.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The topic's name in reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// What is checked, in a few words.
            #[must_use]
            pub fn about(self) -> &'static str {
                match self { $(Self::$variant => $about),+ }
            }
        }
    };
}

topics! {
    Flags "flags" "risky flags, unknown variables";
    Kernel "kernel" "network namespaces can be told apart";
    Programs "programs" "the kernel loads every program that the flags need";
    Capabilities "capabilities" "capabilities, and the user namespace";
    Seccomp "seccomp" "system calls that a seccomp filter forbids";
    Apparmor "apparmor" "the AppArmor profile";
    Selinux "selinux" "the SELinux type";
    Lockdown "lockdown" "the kernel's lockdown mode";
    Realtime "realtime" "`SCHED_FIFO` is allowed";
    Cgroup "cgroup" "cgroup v2, the pods' cgroup";
    Hooks "hooks" "programs can be attached to the pods' cgroup; programs of others there";
    Processes "processes" "pods' processes can be seen";
    Bpffs "bpffs" "the BPF file system, its pins";
    StateDir "state-dir" "`--state-dir` can be written";
    BootGuard "boot-guard" "the folder of `--boot-guard`";
    Ports "ports" "the agent can listen at its addresses";
    EphemeralPorts "ephemeral-ports" "the agent's ports are not ephemeral ones";
    RoutingRules "routing-rules" "routing rules before the route guard's";
    RouteGuard "route-guard" "pods' packets pass the node's routing";
    Uplink "uplink" "the uplink guard's program can be attached";
    Redirects "redirects" "rules that redirect pods' requests, such as kiam's";
    KubeProxy "kube-proxy" "the mode of kube-proxy";
    Inotify "inotify" "inotify's limits";
    OpenFiles "open-files" "the limit of open files";
    Proxy "proxy" "requests that take a proxy";
    Imds "imds" "the metadata service answers";
    ImdsTokens "imds-tokens" "the metadata service requires session tokens";
    HopLimit "hop-limit" "how far an answer with a session token goes";
    Api "api" "the Kubernetes API answers";
    ApiRights "api-rights" "the agent's rights in the Kubernetes API";
    Pods "pods" "the API has the node's pods";
    Sts "sts" "STS answers, and knows the node";
    Roles "roles" "the roles of the node's pods can be assumed";
    Clock "clock" "the node's clock, beside other servers'";
}

// === impl Verdict ===

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

// === impl Check ===

impl Check {
    /// Nothing is lacking.
    #[must_use]
    pub fn ok(topic: Topic, finding: impl Into<String>) -> Self {
        Self { topic, verdict: Verdict::Ok, finding: finding.into(), remedy: None }
    }

    /// The agent runs, and somebody should know this.
    #[must_use]
    pub fn warn(topic: Topic, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::with(Verdict::Warn, topic, finding, remedy)
    }

    /// The agent does not run here, or does not protect.
    #[must_use]
    pub fn fail(topic: Topic, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::with(Verdict::Fail, topic, finding, remedy)
    }

    /// The check could not be made.
    #[must_use]
    pub fn unknown(topic: Topic, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::with(Verdict::Unknown, topic, finding, remedy)
    }

    /// As [`Self::fail`], for an error of the agent's own, whose message has the remedy after its first semicolon. Without
    /// one, `otherwise` is the remedy.
    #[must_use]
    pub fn failed(topic: Topic, error: &dyn fmt::Display, otherwise: &str) -> Self {
        let text = error.to_string();
        match text.split_once("; ") {
            Some((finding, remedy)) => Self::fail(topic, finding, remedy),
            None => Self::fail(topic, text, otherwise),
        }
    }

    fn with(
        verdict: Verdict,
        topic: Topic,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { topic, verdict, finding: finding.into(), remedy: Some(remedy.into()) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn topics_have_names_of_their_own_which_fit_a_column() {
        let names: BTreeSet<_> = Topic::ALL.iter().map(|topic| topic.name()).collect();
        assert_eq!(names.len(), Topic::ALL.len());
        for topic in Topic::ALL {
            assert!(topic.name().len() <= 15 && !topic.about().is_empty(), "{topic:?}");
        }
    }

    #[test]
    fn an_error_is_split_into_finding_and_remedy() {
        let cases = [
            ("a is missing; mount it; or not", "a is missing", "mount it; or not"),
            ("a is missing: b", "a is missing: b", "look"),
        ];
        for (error, finding, remedy) in cases {
            let check = Check::failed(Topic::Bpffs, &error, "look");
            assert_eq!((check.finding.as_str(), check.remedy.as_deref()), (finding, Some(remedy)));
            assert_eq!(check.verdict, Verdict::Fail);
        }
    }

    #[test]
    fn a_failure_is_the_worst_verdict() {
        let all = [Verdict::Ok, Verdict::Unknown, Verdict::Warn, Verdict::Fail];
        assert_eq!(all.into_iter().max(), Some(Verdict::Fail));
        assert_eq!(format!("{:7}|", Verdict::Ok), "ok     |");
    }
}
