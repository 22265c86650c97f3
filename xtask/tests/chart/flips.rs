//! No value is dead: each has a value beside its default that changes what is deployed.

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};
use xtask::{
    command::workspace,
    helm::{CHART, Helm},
    values,
};

use super::{Objects, render};

/// A value's name, another value than its default, and the values without which it would mean nothing.
type Flip = (&'static str, Value, Value);

/// Of the agent, and of what is deployed with it.
fn parts() -> Vec<Flip> {
    let alone = || json!({});
    let audited = || json!({"audit": {"destination": "file"}});
    let kubelet = || json!({"webIdentity": {"tokens": "kubelet"}});
    let taint = || json!({"startupTaint": {"key": "a.example/b"}});
    let admission = || json!({"admissionPolicies": {"enabled": true}});
    let metrics = || json!({"metrics": {"enabled": true}});
    let monitored = |kind: &str| json!({"metrics": {"enabled": true, kind: {"enabled": true}}});
    let (a, on) = (json!("a"), json!(true));
    let map = json!({"a": "b"});
    vec![
        ("name", a.clone(), alone()),
        ("image.repository", a.clone(), alone()),
        ("image.tag", a.clone(), alone()),
        ("image.digest", json!(format!("sha256:{}", "0".repeat(64))), alone()),
        ("image.pullPolicy", json!("Always"), alone()),
        ("imagePullSecrets", json!([{"name": "a"}]), alone()),
        ("mode", json!("observe"), alone()),
        ("roleBaseArn", a.clone(), alone()),
        ("namespacePolicy", json!("optional"), alone()),
        ("assumeRoleArn", a.clone(), alone()),
        ("region", a.clone(), alone()),
        ("sessionDuration", a.clone(), alone()),
        ("nodeRoles", json!(["a/b"]), alone()),
        ("logLevel", json!("debug"), alone()),
        ("jsonLog", json!(false), alone()),
        ("gracePeriodSeconds", json!(0), alone()),
        ("bootGuard", on.clone(), alone()),
        ("audit.destination", json!("off"), alone()),
        ("audit.folder", json!("/a"), audited()),
        ("audit.fileSize", json!("1Gi"), audited()),
        ("preflight.enabled", on.clone(), alone()),
        ("evictOlderPods", on.clone(), alone()),
        ("startupTaint.key", a, alone()),
        ("startupTaint.rights", on.clone(), taint()),
        ("webIdentity.tokens", json!("agent"), alone()),
        ("webIdentity.kubeconfig", json!("/a"), kubelet()),
        ("webIdentity.pki", json!("/a"), kubelet()),
        ("admissionPolicies.enabled", on.clone(), alone()),
        ("admissionPolicies.groups", json!(["a"]), admission()),
        ("metrics.enabled", on.clone(), alone()),
        ("metrics.port", json!(1), metrics()),
        ("metrics.ipv6", on.clone(), metrics()),
        ("metrics.podMonitor.enabled", on.clone(), metrics()),
        ("metrics.podMonitor.labels", map.clone(), monitored("podMonitor")),
        ("metrics.podMonitor.interval", json!("1m"), monitored("podMonitor")),
        ("metrics.serviceMonitor.enabled", on.clone(), metrics()),
        ("metrics.serviceMonitor.labels", map.clone(), monitored("serviceMonitor")),
        ("metrics.serviceMonitor.interval", json!("1m"), monitored("serviceMonitor")),
        ("metrics.prometheusRule.enabled", on.clone(), alone()),
        ("metrics.prometheusRule.labels", map.clone(), monitored("prometheusRule")),
        ("metrics.dashboard.enabled", on, alone()),
        ("metrics.dashboard.labels", map, monitored("dashboard")),
    ]
}

/// Of any chart's pods and objects.
fn common() -> Vec<Flip> {
    let alone = || json!({});
    let (a, on, off) = (json!("a"), json!(true), json!(false));
    let map = json!({"a": "b"});
    vec![
        ("resources", json!({"limits": {"memory": "1Gi"}}), alone()),
        ("tolerations", json!([]), alone()),
        ("nodeSelector", map.clone(), alone()),
        ("affinity", json!({"podAffinity": {}}), alone()),
        ("priorityClassName", json!(""), alone()),
        ("updateStrategy", json!({"type": "OnDelete", "rollingUpdate": null}), alone()),
        ("extraArgs", json!(["--a=b"]), alone()),
        ("extraEnv", json!([{"name": "a", "value": "b"}]), alone()),
        ("extraVolumes", json!([{"name": "a", "emptyDir": {}}]), alone()),
        ("extraVolumeMounts", json!([{"name": "a", "mountPath": "/a"}]), alone()),
        ("labels", map.clone(), alone()),
        ("annotations", map.clone(), alone()),
        ("podLabels", map.clone(), alone()),
        ("podAnnotations", map.clone(), alone()),
        ("ctl.clusterRole.create", on.clone(), alone()),
        ("rbac.create", off.clone(), alone()),
        ("serviceAccount.create", off, alone()),
        ("serviceAccount.name", a, alone()),
        ("serviceAccount.annotations", map, alone()),
        ("uninstall", on, alone()),
    ]
}

/// The names of all values.
pub(super) fn names() -> Vec<String> {
    let text = fs::read_to_string(workspace().join(CHART).join("values.yaml")).unwrap();
    values::rows(&text).unwrap().into_iter().map(|row| row.path).collect()
}

/// `values` with another value at this name.
pub(super) fn with(values: &Value, name: &str, value: Value) -> Value {
    let mut values = values.clone();
    let place = name.split('.').fold(&mut values, |place, key| &mut place[key]);
    *place = value;
    values
}

#[test]
fn each_value_changes_what_is_deployed() {
    let Some(helm) = Helm::of_test() else { return };
    let flips = [parts(), common()].concat();
    let flipped: BTreeSet<_> = flips.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(flipped, names().into_iter().collect());
    let calls: Vec<Value> = flips
        .iter()
        .flat_map(|(name, value, others)| [others.clone(), with(others, name, value.clone())])
        .map(|values| render(CHART, &values))
        .collect();
    let answers = helm.calls(&calls).unwrap();
    for ((name, value, _), pair) in flips.iter().zip(answers.chunks(2)) {
        let [before, after] =
            [0, 1].map(|index| Objects::rendered(pair[index].as_ref().expect(name)));
        assert_ne!(before, after, "{name}: {value}");
    }
}
