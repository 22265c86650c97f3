//! What is wrong with a node's agent, by its status, and what to do about that.

use serde::Serialize;

use crate::admin::{FailingRole, NodeStatus, span};
use kiam_core::lifecycle::ENDING;

/// The silence of a watch that is reported. The agent lists after a minute where no event comes.
const STALE_SECONDS: u64 = 90;
/// The failing roles that are named.
const NAMED: usize = 3;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// What is wrong.
    pub(super) cause: String,
    /// What to do about it.
    pub(super) remedy: String,
}

/// The conditions of readiness: how each is named, what its absence means, and what to do.
const CONDITIONS: [(&str, &str, &str); 17] = [
    (
        "kernel programs attached",
        "the lease is not renewed: pods are denied",
        "see the agent's log for why: the kernel programs are not attached, or the agent hangs",
    ),
    ("serving pods", "it does not serve pods yet", "wait; if it lasts, see its log"),
    (
        "pods",
        "it has not listed the node's pods",
        "see whether it reaches the Kubernetes API, and its rights",
    ),
    (
        "namespaces",
        "it has not listed namespaces",
        "see whether it reaches the Kubernetes API, and its rights",
    ),
    (
        "service accounts",
        "it has not listed ServiceAccounts",
        "see whether it reaches the Kubernetes API, and its rights: docs/web-identity.md",
    ),
    (
        "first credentials",
        "it has not got the first credentials of the node's pods",
        "see whether the node reaches STS, and may assume the roles",
    ),
    (
        "self-test",
        "the self-test does not pass: pods may not be intercepted correctly",
        "docs/runbook.md, by the part that fails",
    ),
    (
        "older connections ended",
        "pods' connections to the metadata service that are older than it are not ended",
        "see its log",
    ),
    (
        "TLS with the Kubernetes API",
        "TLS with the Kubernetes API fails",
        "replace the certificate or CA that the detail names: docs/runbook.md",
    ),
    (
        "TLS with the Kubernetes API, for tokens",
        "TLS with the Kubernetes API fails for requests of tokens",
        "replace the certificate or CA that the detail names: docs/runbook.md",
    ),
    (
        "cgroups and network namespaces of the node's pods",
        "it does not find pods' cgroups or network namespaces",
        "see --cgroup, and whether its pod has hostPID: docs/runbook.md",
    ),
    (
        "room for pods' connections in the kernel",
        "the kernel's tables are full: connects are denied",
        "see which pods open connections without end: docs/runbook.md",
    ),
    (
        "programs at the pods' cgroup, which was recreated",
        "the pods' cgroup was recreated: the programs are not at the new one",
        "restart the agent's pod",
    ),
    (
        "restoring detached programs or pins",
        "something detached its programs or removed its pins",
        "find what does: another agent, or a cleanup of /sys/fs/bpf",
    ),
    (
        "one pods' cgroup, of several in use",
        "the node's pods are below several cgroups",
        "see --cgroup, and the kubelet's cgroup driver: docs/runbook.md",
    ),
    (
        "watches of pods' cgroups (fs.inotify limits)",
        "the kernel refuses to watch pods' cgroups",
        "raise fs.inotify.max_user_watches and max_user_instances",
    ),
    (
        "handed over to a newer agent",
        "a newer agent of the node serves",
        "delete this pod, if its end is not under way",
    ),
];

/// Everything that is wrong, the gravest first.
pub(super) fn findings(status: &NodeStatus) -> Vec<Finding> {
    let mut findings = of_agent(status);
    let errors = &status.credentials.errors;
    findings.extend(errors.iter().take(NAMED).map(|FailingRole { role, error, .. }| Finding {
        cause: format!("no credentials of {role}: {error}"),
        remedy: remedy_of(error).to_owned(),
    }));
    let more = status.credentials.failing.saturating_sub(NAMED);
    if more > 0 {
        findings.push(Finding {
            cause: match more {
                1 => "1 more role has no credentials".to_owned(),
                more => format!("{more} more roles have no credentials"),
            },
            remedy: "`kubectl kiam pods` shows whose they are".to_owned(),
        });
    }
    findings
}

/// What is wrong with the agent itself, whatever roles its pods want.
pub(super) fn of_agent(status: &NodeStatus) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in &status.pending {
        findings.push(of_condition(name, status));
    }
    let mut add = |cause: String, remedy: &str| {
        findings.push(Finding { cause, remedy: remedy.to_owned() });
    };
    if let Some(guard) = status.guard.as_ref().filter(|text| text.starts_with("open")) {
        add(
            format!("route guard {guard}"),
            "add uplink to --guard, and set the instances' hop limit to 1: docs/guard.md",
        );
    }
    let failing = "it goes on with the records that it has: see whether it reaches the Kubernetes API, and its rights";
    for (name, text) in status.details.iter().filter(|(name, _)| name.starts_with("Kubernetes API"))
    {
        add(format!("{name} {text}"), failing);
    }
    for (kind, silence) in &status.watches {
        if let Some(seconds) = silence.filter(|seconds| *seconds >= STALE_SECONDS) {
            let cause = format!("the watch of {kind} has been silent for {}", span(seconds));
            add(cause, failing);
        }
    }
    if let Some(failed) = status.details.get("boot guard").filter(|text| text.starts_with("failed"))
    {
        add(format!("boot guard {failed}"), "docs/boot.md");
    }
    if status.ready && status.self_test.as_deref().is_some_and(|text| text != "passed") {
        add(
            format!("self-test: {}", status.self_test.as_deref().unwrap_or_default()),
            "docs/runbook.md",
        );
    }
    findings
}

fn of_condition(name: &str, status: &NodeStatus) -> Finding {
    let known = CONDITIONS.iter().find(|(known, ..)| *known == name);
    let (cause, remedy) = match known {
        Some((_, cause, remedy)) => ((*cause).to_owned(), *remedy),
        None if name == ENDING => (name.to_owned(), "nothing: it is being replaced"),
        None => (format!("pending: {name}"), "docs/runbook.md"),
    };
    let detail = match name {
        "self-test" => status.self_test.as_deref(),
        "pods" | "namespaces" | "service accounts" => api_error(status),
        name => status.details.get(name).map(String::as_str),
    };
    let cause = match detail {
        Some(detail) => format!("{cause}: {detail}"),
        None => cause,
    };
    Finding { cause, remedy: remedy.to_owned() }
}

/// The last error of a request to the Kubernetes API that the agent logged.
fn api_error(status: &NodeStatus) -> Option<&str> {
    let fails = |text: &&str| text.starts_with("Requests to the Kubernetes API");
    let text = status.warnings.iter().map(|warning| warning.text.as_str()).find(fails)?;
    text.split_once(" error=").map(|(_, error)| error)
}

/// What to do about an error of STS.
pub(super) fn remedy_of(error: &str) -> &'static str {
    if error.contains("AccessDenied") {
        return "the role must exist, and its trust policy must name the node's role, which must be allowed sts:AssumeRole";
    }
    if error.contains("Throttl") {
        return "the account's quota of STS is used up: lower --sts-rate, or see who else asks";
    }
    if error.contains("ExpiredToken") || error.contains("InvalidClientTokenId") {
        return "the node's own credentials are not valid: see its instance profile, and its clock";
    }
    "see whether the node reaches STS: its endpoint, its proxy and its security groups"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::CredentialCounts;

    #[test]
    fn each_condition_that_the_agent_has_is_explained() {
        // Of the sources, so that a new condition is not forgotten here.
        let sources = ["src", "kernel/src"].map(std::path::PathBuf::from);
        let mut names = Vec::new();
        for folder in sources {
            for text in texts(&folder) {
                let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
                for rest in code.split(".latch(\"").skip(1) {
                    names.push(rest.split('"').next().unwrap().to_owned());
                }
            }
        }
        assert!(names.len() >= 14, "{names:?}");
        for name in names {
            assert!(CONDITIONS.iter().any(|(known, ..)| *known == name), "{name}");
        }
    }

    /// The sources below `folder`, without those of tests.
    fn texts(folder: &std::path::Path) -> Vec<String> {
        let mut texts_below = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                _ if path.file_stem().is_some_and(|name| name == "tests") => {}
                true => texts_below.extend(texts(&path)),
                false => texts_below.extend(std::fs::read_to_string(&path)),
            }
        }
        texts_below
    }

    #[test]
    fn what_is_wrong_is_named_with_what_to_do() {
        let role = FailingRole {
            role: "arn:aws:iam::1:role/a".to_owned(),
            error: "STS: AccessDenied: no".to_owned(),
            retry_seconds: 3,
        };
        let status = NodeStatus {
            pending: vec!["self-test".to_owned(), "something new".to_owned()],
            self_test: Some("pod-local: connect denied".to_owned()),
            guard: Some("open: pods' packets".to_owned()),
            watches: [("pods".to_owned(), Some(91)), ("namespaces".to_owned(), Some(89))].into(),
            credentials: CredentialCounts {
                failing: 5,
                errors: vec![role; 5],
                ..CredentialCounts::default()
            },
            ..NodeStatus::default()
        };
        let all = findings(&status);
        let causes: Vec<&str> = all.iter().map(|it| it.cause.as_str()).collect();
        assert_eq!(
            causes,
            [
                "the self-test does not pass: pods may not be intercepted correctly: pod-local: connect denied",
                "pending: something new",
                "route guard open: pods' packets",
                "the watch of pods has been silent for 1m 31s",
                "no credentials of arn:aws:iam::1:role/a: STS: AccessDenied: no",
                "no credentials of arn:aws:iam::1:role/a: STS: AccessDenied: no",
                "no credentials of arn:aws:iam::1:role/a: STS: AccessDenied: no",
                "2 more roles have no credentials",
            ]
        );
        assert!(all[4].remedy.contains("trust policy"), "{all:?}");
        let fine =
            NodeStatus { ready: true, self_test: Some("passed".to_owned()), ..Default::default() };
        assert_eq!(findings(&fine), []);
    }
}
