//! Each part of the chart beside its kustomization, and beside what the documents have operators do with it.

use std::fs;

use serde_json::{Value, json};
use xtask::{
    command::{output_of, workspace},
    helm::{Helm, kustomization},
};

use super::{Objects, deployed};

/// A JSON patch of the agent's DaemonSet.
type Patch = Vec<Value>;

/// Values of the chart, and a kustomization that does the same.
struct Part {
    name: &'static str,
    values: Value,
    /// Folders below `deploy/`, which itself is the first.
    resources: &'static [&'static str],
    components: &'static [&'static str],
    patch: Patch,
}

fn part(name: &'static str, values: Value, resources: &'static [&'static str]) -> Part {
    Part { name, values, resources, components: &[], patch: Vec::new() }
}

/// Gives the agent another flag.
fn flag(flag: &str) -> Value {
    json!({"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": flag})
}

/// Takes a flag away.
fn without(flag: &str, index: usize) -> Patch {
    let path = format!("/spec/template/spec/containers/0/args/{index}");
    vec![json!({"op": "test", "path": path, "value": flag}), json!({"op": "remove", "path": path})]
}

fn page(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap()
}

/// The patch that the page has operators apply for tokens of the kubelet.
fn kubelet() -> Patch {
    let page = page("docs/web-identity.md");
    let patch = page.split("--type=json -p '").nth(1).and_then(|rest| rest.split('\'').next());
    serde_json::from_str(patch.unwrap()).unwrap()
}

/// The part with a flag beside what it is otherwise.
fn flagged(text: &str, part: Part) -> Part {
    Part { patch: vec![flag(text)], ..part }
}

/// All that the chart can add to the agent and beside it, and the default.
fn parts() -> Vec<Part> {
    let autodetect = || without("--role-base-arn-autodetect", 2);
    let taint = "kiam.example.com/agent-not-ready";
    vec![
        part("the default", json!({}), &[]),
        Part {
            patch: vec![flag("--mode=observe")],
            ..part("observing", json!({"mode": "observe"}), &[])
        },
        Part {
            components: &["boot-guard"],
            ..part("the boot guard", json!({"bootGuard": true}), &[])
        },
        Part {
            components: &["audit-file"],
            ..part("the audit's file", json!({"audit": {"destination": "file"}}), &[])
        },
        // YAML reads off as false.
        flagged("--audit=off", part("no audit", json!({"audit": {"destination": false}}), &[])),
        flagged(
            "--evict-older-pods",
            part("evictions", json!({"evictOlderPods": true}), &["evict-older-pods"]),
        ),
        part("kubectl kiam", json!({"ctl": {"clusterRole": {"create": true}}}), &["ctl"]),
        part("the taint's rule", json!({"startupTaint": {"key": taint}}), &["startup-taint/rules"]),
        Part {
            patch: vec![flag(&format!("--startup-taint={taint}"))],
            ..part(
                "the taint",
                json!({"startupTaint": {"key": taint, "rights": true}}),
                &["startup-taint/rules", "startup-taint"],
            )
        },
        part(
            "the rules of web identity",
            json!({"webIdentity": {"tokens": "rules"}}),
            &["web-identity/rules"],
        ),
        Part {
            patch: [vec![flag("--credential-source=web-identity")], autodetect()].concat(),
            ..part(
                "web identity",
                json!({"webIdentity": {"tokens": "agent"}}),
                &["web-identity/rules", "web-identity"],
            )
        },
        Part {
            patch: [kubelet(), autodetect()].concat(),
            ..part(
                "web identity by the kubelet",
                json!({"webIdentity": {"tokens": "kubelet"}}),
                &["web-identity/kubelet"],
            )
        },
        part(
            "the admission policies",
            json!({"admissionPolicies": {"enabled": true}}),
            &["admission"],
        ),
    ]
}

/// The metrics, and what uses them.
fn metrics() -> [Part; 2] {
    let on = json!({"enabled": true});
    let monitoring = json!({"metrics": {
        "enabled": true, "podMonitor": on, "prometheusRule": on, "dashboard": on,
    }});
    let patch = || vec![flag("--metrics=$(HOST_IP):9620")];
    [
        Part { patch: patch(), ..part("metrics", json!({"metrics": {"enabled": true}}), &[]) },
        Part { patch: patch(), ..part("monitoring", monitoring, &["monitoring"]) },
    ]
}

/// The init container that checks a node, which has all that the agent has.
fn preflight() -> [Part; 2] {
    let on = |boot_guard| json!({"preflight": {"enabled": true}, "bootGuard": boot_guard});
    [
        Part { components: &["preflight"], ..part("preflight", on(false), &[]) },
        Part {
            components: &["boot-guard", "preflight"],
            ..part("preflight of the boot guard", on(true), &[])
        },
    ]
}

/// What kustomize makes of `text`.
fn kustomized(helm: &Helm, text: &Value) -> Objects {
    let folder = kustomization(text).unwrap();
    let made = output_of(helm.kubectl().arg("kustomize").arg(folder.path()));
    Objects::parse(std::iter::once(made.expect("kustomize takes it").as_str()))
}

#[test]
fn each_part_deploys_what_its_kustomization_does() {
    let Some(helm) = Helm::of_test() else { return };
    for part in parts().into_iter().chain(metrics()).chain(preflight()) {
        let folder = |name: &&str| format!("../../deploy/{name}");
        let resources: Vec<_> = [""].iter().chain(part.resources).map(folder).collect();
        let components: Vec<_> = part.components.iter().map(folder).collect();
        let target = json!({"kind": "DaemonSet", "name": "kiam-agent"});
        let patch = json!([{"target": target, "patch": json!(part.patch).to_string()}]);
        let patches = if part.patch.is_empty() { json!([]) } else { patch };
        let text = json!({"resources": resources, "components": components, "patches": patches});
        let wanted = kustomized(&helm, &text);
        assert!(wanted.len() >= 4, "{wanted:?}");
        deployed(&helm, &part.values).assert_same(&wanted, part.name);
    }
}

#[test]
fn uninstall_deploys_what_its_kustomization_does_and_nothing_else() {
    let Some(helm) = Helm::of_test() else { return };
    let wanted = kustomized(&helm, &json!({"resources": ["../../deploy/uninstall"]}));
    let all = json!({
        "uninstall": true, "webIdentity": {"tokens": "agent"}, "admissionPolicies": {"enabled": true},
        "startupTaint": {"key": "a.example/b", "rights": true}, "evictOlderPods": true,
        "ctl": {"clusterRole": {"create": true}},
        "metrics": {
            "enabled": true, "podMonitor": {"enabled": true}, "serviceMonitor": {"enabled": true},
            "prometheusRule": {"enabled": true}, "dashboard": {"enabled": true},
        },
    });
    deployed(&helm, &all).assert_same(&wanted, "uninstall");
}

/// The DaemonSet whose missing pods an alert counts is the release's.
#[test]
fn alerts_follow_the_name() {
    let Some(helm) = Helm::of_test() else { return };
    let values = json!({"name": "other", "metrics": {"prometheusRule": {"enabled": true}}});
    let rules = deployed(&helm, &values).get("PrometheusRule", "other").to_string();
    assert!(rules.contains(r#"daemonset=\"other\""#), "{rules}");
    assert!(!rules.contains(r#"daemonset=\"kiam-agent\""#), "{rules}");
}
