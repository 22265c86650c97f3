//! What Helm refuses, and how it says so.

use std::fs;

use serde_json::{Value, json};
use xtask::{
    command::workspace,
    helm::{CHART, Helm},
};

use super::{
    flips::{names, with},
    render,
};

/// Values, and what the message must name: the value's place, and what is wrong with it.
fn refused() -> Vec<(Value, [&'static str; 2])> {
    let monitor = json!({"metrics": {"podMonitor": {"enabled": true}}});
    vec![
        (json!({"rolebaseArn": "a"}), ["''", "'rolebaseArn' not allowed"]),
        (json!({"image": {"tga": "a"}}), ["/image", "'tga' not allowed"]),
        (json!({"image": {"tag": 1.1}}), ["/image/tag", "want string"]),
        (json!({"image": {"digest": "sha256:12"}}), ["/image/digest", "'sha256:12'"]),
        (json!({"image": {"pullPolicy": "Sometimes"}}), ["/image/pullPolicy", "'IfNotPresent'"]),
        (json!({"mode": "off"}), ["/mode", "'enforce', 'observe'"]),
        (json!({"namespacePolicy": true}), ["/namespacePolicy", "'required', 'optional'"]),
        (json!({"logLevel": "verbose"}), ["/logLevel", "'debug'"]),
        (json!({"gracePeriodSeconds": "30s"}), ["/gracePeriodSeconds", "want integer"]),
        (json!({"gracePeriodSeconds": -1}), ["/gracePeriodSeconds", "minimum"]),
        (json!({"audit": {"destination": "disk"}}), ["/audit/destination", "'file'"]),
        (json!({"audit": {"folder": "audit"}}), ["/audit/folder", "'audit'"]),
        (json!({"audit": {"fileSize": "64MB"}}), ["/audit/fileSize", "'64MB'"]),
        (json!({"nodeRoles": ["aws-node"]}), ["/nodeRoles/0", "'aws-node'"]),
        (json!({"nodeRoles": "kube-system/aws-node"}), ["/nodeRoles", "want array"]),
        (json!({"startupTaint": {"key": "a=:NoSchedule"}}), ["/startupTaint/key", "NoSchedule"]),
        // What ends the string in the policy.
        (json!({"startupTaint": {"key": "a' || true || '"}}), ["/startupTaint/key", "pattern"]),
        (
            json!({"admissionPolicies": {"groups": ["a', 'system:authenticated"]}}),
            ["/admissionPolicies/groups/0", "pattern"],
        ),
        (json!({"admissionPolicies": {"groups": []}}), ["/admissionPolicies/groups", "minItems"]),
        (json!({"serviceAccount": {"name": "a' || true"}}), ["/serviceAccount/name", "pattern"]),
        (json!({"name": "Kiam"}), ["/name", "'Kiam'"]),
        (json!({"webIdentity": {"tokens": "off"}}), ["/webIdentity/tokens", "'kubelet'"]),
        (json!({"metrics": {"port": 96200}}), ["/metrics/port", "maximum"]),
        (json!({"metrics": {"podMonitor": {"interval": "30"}}}), ["/interval", "'30'"]),
        (json!({"updateStrategy": {"type": "Recreate"}}), ["/updateStrategy/type", "'OnDelete'"]),
        (json!({"extraArgs": ["level=debug"]}), ["/extraArgs/0", "'level=debug'"]),
        (json!({"podLabels": {"a": 1}}), ["/podLabels/a", "want string"]),
        (json!({"resources": {"cpu": 1}}), ["/resources", "'cpu' not allowed"]),
        (json!({"uninstall": "yes"}), ["/uninstall", "want boolean"]),
        // What no schema can say in words.
        (json!({"startupTaint": {"rights": true}}), ["startupTaint.rights", "startupTaint.key"]),
        (monitor, ["metrics.podMonitor", "metrics.enabled"]),
    ]
}

#[test]
fn bad_values_are_refused_by_their_name() {
    let Some(helm) = Helm::of_test() else { return };
    let rows = refused();
    let calls: Vec<Value> = rows.iter().map(|(values, _)| render(CHART, values)).collect();
    for (answer, (values, named)) in helm.calls(&calls).unwrap().into_iter().zip(rows) {
        let message = answer.expect_err(&values.to_string());
        for name in named {
            assert!(message.contains(name), "{values}: no {name} in {message}");
        }
    }
}

#[test]
fn each_value_has_a_type() {
    let Some(helm) = Helm::of_test() else { return };
    let names = names();
    let wrong = |name: &String| render(CHART, &with(&json!({}), name, json!(12.5)));
    let answers = helm.calls(&names.iter().map(wrong).collect::<Vec<_>>()).unwrap();
    for (answer, name) in answers.into_iter().zip(names) {
        let message = answer.expect_err(&name);
        let place = format!("'/{}'", name.replace('.', "/"));
        assert!(message.contains(&place), "no {place} in {message}");
    }
}

#[test]
fn schema_names_all_that_an_object_has() {
    let text = fs::read_to_string(workspace().join(CHART).join("values.schema.json")).unwrap();
    let mut objects = vec![serde_json::from_str::<Value>(&text).unwrap()];
    let mut strict = 0;
    while let Some(object) = objects.pop() {
        if object["properties"].is_object() && object["type"] != Value::Null {
            assert_eq!(object["additionalProperties"], json!(false), "{object}");
            strict += 1;
        }
        let parts = object.as_object().into_iter().flat_map(|map| map.values());
        objects.extend(parts.chain(object.as_array().into_iter().flatten()).cloned());
    }
    assert!(strict > 10, "{strict}");
}
