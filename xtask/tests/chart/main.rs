//! The Helm chart, rendered by Helm's own code, deploys what kustomize makes of `deploy/`; every value does something.
//!
//! `cargo xtask test chart` installs Helm and kubectl below `target/tools` and runs these tests. Without them the tests are
//! skipped.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod flips;
mod objects;
mod parts;
mod refused;

use serde_json::{Value, json};
use xtask::{
    command::workspace,
    helm::{CHART, Helm},
};

use self::objects::Objects;

/// What `helm template` has to know.
fn render(chart: &str, values: &Value) -> Value {
    render_as(chart, values, "kube-system")
}

fn render_as(chart: &str, values: &Value, namespace: &str) -> Value {
    let (release, chart) = ("kiam-agent", workspace().join(chart));
    json!({"do": "render", "chart": chart, "values": values, "name": release, "namespace": namespace})
}

/// What the chart deploys with these values.
fn deployed(helm: &Helm, values: &Value) -> Objects {
    let answers = helm.calls(&[render(CHART, values)]).unwrap();
    Objects::rendered(answers[0].as_ref().unwrap())
}

#[test]
fn lint_has_no_warnings() {
    let Some(helm) = Helm::of_test() else { return };
    let chart = workspace().join(CHART);
    let call = json!({"do": "lint", "chart": chart, "values": {}, "strict": true});
    let answers = helm.calls(&[call]).unwrap();
    let report = answers[0].as_ref().unwrap();
    let messages = report["messages"].as_array().unwrap().iter();
    // 2 is a warning, 3 an error.
    let serious: Vec<_> = messages.filter(|it| it["severity"].as_u64().unwrap() > 1).collect();
    assert!(serious.is_empty(), "{serious:?}");
    assert_eq!(report["total_charts_linted"], 1, "{report}");
}

#[test]
fn digest_takes_precedence_over_tag() {
    let Some(helm) = Helm::of_test() else { return };
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let both = json!({"image": {"repository": "a.example/b", "tag": "c", "digest": digest}});
    let image = format!("a.example/b@{digest}");
    let agent = deployed(&helm, &both);
    assert_eq!(agent.daemonset("kiam-agent")["containers"][0]["image"], *image);
    let mut uninstall = both;
    uninstall["uninstall"] = json!(true);
    let uninstall = deployed(&helm, &uninstall);
    let pod = uninstall.daemonset("kiam-uninstall");
    assert_eq!(pod["initContainers"][0]["image"], *image);
    assert_eq!(pod["containers"][0]["image"], *image);
}

/// The policies are links to the files that kustomize deploys.
#[test]
fn packaged_chart_is_whole() {
    let Some(helm) = Helm::of_test() else { return };
    let folder = tempfile::tempdir().unwrap();
    let chart = workspace().join(CHART);
    let package = json!({"do": "package", "chart": chart, "destination": folder.path()});
    let archive = helm.calls(&[package]).unwrap().remove(0).unwrap();
    let values = json!({
        "startupTaint": {"key": "a.example/b", "rights": true}, "webIdentity": {"tokens": "agent"},
        "admissionPolicies": {"enabled": true},
    });
    let archived = render(archive.as_str().unwrap(), &values);
    let answers = helm.calls(&[archived, render(CHART, &values)]).unwrap();
    let [packaged, here] = [0, 1].map(|index| Objects::rendered(answers[index].as_ref().unwrap()));
    assert!(here.len() > 12, "{here:?}");
    packaged.assert_same(&here, "the package");
}

/// The policies are about a user, whom other values call otherwise: rules for somebody else would bound nothing.
#[test]
fn policies_follow_the_names() {
    let Some(helm) = Helm::of_test() else { return };
    let values = json!({
        "name": "other", "serviceAccount": {"name": "account"},
        "startupTaint": {"key": "a.example/b", "rights": true}, "webIdentity": {"tokens": "agent"},
    });
    let answers = helm.calls(&[render_as(CHART, &values, "place")]).unwrap();
    let objects = Objects::rendered(answers[0].as_ref().unwrap());
    let policies = objects.of_kind("ValidatingAdmissionPolicy");
    assert_eq!(policies.len(), 3, "{policies:?}");
    for policy in &policies {
        let condition = &policy["spec"]["matchConditions"][0]["expression"];
        assert_eq!(
            *condition,
            "request.userInfo.username == 'system:serviceaccount:place:account'"
        );
        let text = policy.to_string();
        assert!(!text.contains("kiam-agent is") && !text.contains("kube-system"), "{text}");
    }
    let key = &objects.get("ValidatingAdmissionPolicy", "other-nodes")["spec"]["variables"][0];
    assert_eq!(*key, json!({"name": "key", "expression": "'a.example/b'"}));
    let subjects = objects.of_kind("ClusterRoleBinding");
    assert_eq!(subjects.len(), 3, "{subjects:?}");
    for binding in subjects {
        let account = json!([{"kind": "ServiceAccount", "name": "account", "namespace": "place"}]);
        assert_eq!(binding["subjects"], account);
    }
}

#[test]
fn groups_of_the_admission_policy_are_the_values() {
    let Some(helm) = Helm::of_test() else { return };
    let values = json!({"admissionPolicies": {"enabled": true, "groups": ["a", "b:c"]}});
    let objects = deployed(&helm, &values);
    let policy = objects.get("ValidatingAdmissionPolicy", "kiam-namespace-annotations");
    assert_eq!(
        policy["spec"]["variables"][0],
        json!({"name": "groups", "expression": "['a', 'b:c']"})
    );
}
