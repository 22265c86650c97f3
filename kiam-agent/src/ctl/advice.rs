//! What to do about a pod, by what its node's agent knows of it.

use serde_json::Value;

use super::findings::remedy_of;
use kiam_requests::imds::{AllowPath, InvalidPath};

/// What to do so that `pod`, as `kiam-agent pods` shows it, gets what it asks for.
pub(super) fn advice(pod: &Value) -> Vec<String> {
    let mut advice = Vec::new();
    let text = |name: &str| pod[name].as_str().unwrap_or_default();
    if pod["served"] != true {
        advice.extend(of_role(pod, text("answer"), text("refused")));
    }
    let rejected = pod["rejected"].as_array().into_iter().flatten();
    for request in rejected {
        let field = |name: &str| request[name].as_str().unwrap_or_default();
        let path = field("path");
        let hint = match field("reason") {
            "Path" => of_path(path),
            "TokenMissing" => format!(
                "{} asks without a token: update it, or let its namespace allow that",
                program(field("userAgent"))
            ),
            "OtherRole" => {
                format!("it asks for {path}, a role that is not its own: see its configuration")
            }
            "Host" | "ForwardedFor" => {
                "it asks through a proxy or by another name: set no_proxy=169.254.169.254"
                    .to_owned()
            }
            _ => continue,
        };
        advice.push(hint);
    }
    advice.dedup();
    advice
}

fn of_role(pod: &Value, answer: &str, refused: &str) -> Option<String> {
    let hint = if answer.starts_with("the real metadata service's") {
        "nothing, if it is meant to be the node; otherwise it must not use the node's network"
    } else if answer.contains("can't connect") {
        "docs/paths.md says when a pod has no path to the agent"
    } else if answer.contains("has ended") {
        "its containers have ended: nothing asks any more"
    } else if let Some(error) = pod["credentials"]["failed"].as_str() {
        remedy_of(error)
    } else if pod["credentials"]["waiting"].is_string() || pod["credentials"] == "pending" {
        "wait: STS has not been asked yet, or has not answered"
    } else if refused.is_empty() {
        return None;
    } else if pod["annotation"].is_null() {
        "annotate the pod's template with iam.amazonaws.com/role, if it needs one: docs/annotations.md"
    } else if refused.contains("namespace") {
        "the namespace's annotations decide: iam.amazonaws.com/permitted or allowed-roles must match the role: docs/policy.md"
    } else {
        "docs/annotations.md and docs/policy.md say which roles a pod may name"
    };
    Some(hint.to_owned())
}

/// Pods choose what they ask for: also what the flag does not take, and a `*`, by which it would open a whole folder.
fn of_path(path: &str) -> String {
    match path.parse::<AllowPath>() {
        Ok(_) if !path.contains('*') => {
            format!("if it needs {path}, open it for all pods: --allow-path={path}")
        }
        Err(InvalidPath::Denied(_)) => {
            format!(
                "it asks for {path}, which is the node's and which no flag opens: docs/paths.md"
            )
        }
        _ => format!("it asks for {path}: docs/paths.md says which paths pods may read"),
    }
}

fn program(user_agent: &str) -> &str {
    if user_agent.is_empty() { "a program without a User-Agent" } else { user_agent }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_cause_decides_what_to_do() {
        for (pod, parts) in [
            (json!({ "served": true }), &[][..]),
            (json!({ "served": false, "refused": "no role", "annotation": null }), &["annotate"]),
            (
                json!({ "served": false, "refused": "namespace \"shop\" permits x", "annotation": "a" }),
                &["namespace's annotations"],
            ),
            (
                json!({ "served": false, "credentials": { "failed": "STS: AccessDenied: x" } }),
                &["trust policy"],
            ),
            (json!({ "served": false, "credentials": "pending" }), &["wait"]),
            (
                json!({ "served": true, "rejected": [
                    { "reason": "Path", "path": "/latest/meta-data/tags/instance/team" },
                    { "reason": "Path", "path": "/latest/user-data" },
                    { "reason": "Path", "path": "/latest/meta-data/*" },
                    { "reason": "Path", "path": "/2009-04-04/meta-data/$(id)" },
                    { "reason": "TokenMissing", "userAgent": "Boto/2" },
                    { "reason": "Ttl" },
                ] }),
                &[
                    "--allow-path=/latest/meta-data/tags/instance/team",
                    "/latest/user-data, which is the node's and which no flag opens",
                    "/latest/meta-data/*: docs/paths.md says",
                    "/2009-04-04/meta-data/$(id): docs/paths.md says",
                    "Boto/2 asks without a token",
                ],
            ),
        ] {
            let advice = advice(&pod);
            assert_eq!(advice.len(), parts.len(), "{advice:?}");
            for (hint, part) in advice.iter().zip(parts) {
                assert!(hint.contains(part), "{hint}");
            }
        }
    }
}
