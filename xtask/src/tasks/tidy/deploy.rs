//! The manifests of `deploy/` are complete, and speak of flags that exist.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Complaint, File, Tree};

const FOLDER: &str = "deploy/";
/// Templates, which `cargo xtask test chart` compares with the rest.
const CHART: &str = "deploy/chart/";
const LIST: &str = "kustomization.yaml";
const DEFAULT: &str = "deploy/kustomization.yaml";
const FLAGS: &str = "docs/flags.md";

/// Every manifest parses and is listed in its folder; nothing takes a host port; every flag of the DaemonSet is on
/// the page of flags; every admission policy is in force.
pub(super) fn manifests_are_sound(tree: &Tree) -> Vec<Complaint> {
    if tree.get(DEFAULT).is_none() {
        return vec![format!("{DEFAULT} is not there")];
    }
    let manifests = tree
        .files
        .iter()
        .filter(|file| file.path.starts_with(FOLDER) && file.path.ends_with(".yaml"))
        .filter(|file| !file.path.starts_with(CHART));
    let mut complaints = Vec::new();
    let mut all = Vec::new();
    for file in manifests {
        let (folder, name) = file.path.rsplit_once('/').unwrap_or_default();
        let list = format!("{folder}/{LIST}");
        if name == LIST {
            complaints.extend(missing(file, folder, tree));
        } else if !tree.get(&list).is_some_and(|list| listed(list).iter().any(|it| it == name)) {
            complaints.push(format!("{}: not listed in {list}", file.path));
        }
        match documents(file) {
            Ok(documents) => {
                let faults = documents.iter().flat_map(|document| faults(document, tree));
                complaints.extend(faults.map(|fault| format!("{}: {fault}", file.path)));
                all.extend(documents);
            }
            Err(error) => complaints.push(format!("{}: {error}", file.path)),
        }
    }
    complaints.extend(policies_without_force(&all));
    complaints
}

/// What a kustomization lists and is not there.
fn missing(list: &File, folder: &str, tree: &Tree) -> Vec<Complaint> {
    let absent = |name: &String| tree.get(&format!("{folder}/{name}")).is_none();
    let names = listed(list).into_iter().filter(absent);
    names.map(|name| format!("{}: `{name}` is not there", list.path)).collect()
}

/// Admission policies that no binding denies by: they would change nothing, and nobody would see it.
fn policies_without_force(documents: &[Value]) -> Vec<Complaint> {
    let of_kind = |kind: &str| -> Vec<&Value> {
        documents.iter().filter(|document| document["kind"] == *kind).collect()
    };
    let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let denied: BTreeSet<String> = of_kind("ValidatingAdmissionPolicyBinding")
        .iter()
        .filter(|binding| binding["spec"]["validationActions"] == serde_json::json!(["Deny"]))
        .map(|binding| name(&binding["spec"]["policyName"]))
        .collect();
    let policies: BTreeSet<String> = of_kind("ValidatingAdmissionPolicy")
        .iter()
        .filter(|policy| policy["spec"]["failurePolicy"] == "Fail")
        .map(|policy| name(&policy["metadata"]["name"]))
        .collect();
    let loose = denied.symmetric_difference(&policies);
    loose
        .map(|name| {
            format!("{FOLDER}: `{name}` needs a policy that fails closed and a binding that denies")
        })
        .collect()
}

fn documents(file: &File) -> Result<Vec<Value>, String> {
    serde_saphyr::from_multiple(&file.text).map_err(|error| error.to_string())
}

fn listed(list: &File) -> Vec<String> {
    let documents = documents(list).unwrap_or_default();
    let list_of = |key: &str| -> Vec<Value> {
        let list = documents.first().and_then(|document| document[key].as_array().cloned());
        list.unwrap_or_default()
    };
    let patches = list_of("patches").into_iter().map(|patch| patch["path"].clone());
    list_of("resources")
        .into_iter()
        .chain(patches)
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect()
}

fn faults(document: &Value, tree: &Tree) -> Vec<String> {
    let pod = &document["spec"]["template"]["spec"];
    let containers = pod["containers"].as_array().cloned().unwrap_or_default();
    let page = tree.get(FLAGS).map_or("", |file| file.text.as_str());
    let mut faults = Vec::new();
    for container in &containers {
        if !container["ports"].is_null() {
            faults.push(
                "`ports` of a pod in the host's network are host ports, and two agents could not \
                         be on one node during an update"
                    .to_owned(),
            );
        }
    }
    for flag in flags(document, &containers) {
        if !page.contains(&format!("`{flag}`")) && !page.contains(&format!("`{flag}=")) {
            faults.push(format!("the flag `{flag}` is not in {FLAGS}"));
        }
    }
    faults
}

/// The flags of a manifest's containers, and those that a patch adds.
fn flags(document: &Value, containers: &[Value]) -> Vec<String> {
    let args = containers.iter().filter_map(|container| container["args"].as_array()).flatten();
    let patches = document.as_array().into_iter().flatten();
    let patched = patches
        .map(|patch| &patch["value"])
        .filter(|value| value.as_str().is_some_and(|value| value.starts_with("--")));
    let flags = args.chain(patched).filter_map(Value::as_str);
    flags.filter_map(|flag| flag.split('=').next()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "resources:\n- daemonset.yaml\n";
    const SET: &str = "spec:\n  template:\n    spec:\n      containers:\n      - name: a\n        args: ['--host=$(HOST_IP)']\n";

    const PATCHED: &str = "patches:\n- path: patch.yaml\n";
    const PATCH: &str = "- {op: add, path: /spec/args/-, value: --host=a}\n";

    fn complaints(files: &[(&str, &str)]) -> Vec<Complaint> {
        manifests_are_sound(&Tree::of(files))
    }

    #[test]
    fn sound_manifests_pass() {
        let page = "| `--host` | required |";
        let files = [(DEFAULT, LISTED), ("deploy/daemonset.yaml", SET), (FLAGS, page)];
        assert_eq!(complaints(&files), Vec::<String>::new());
    }

    #[test]
    fn each_fault_is_found() {
        let ports = format!("{SET}        ports: [{{containerPort: 1}}]\n");
        let cases = [
            (LISTED, "deploy/other.yaml", "a: 1", "`daemonset.yaml` is not there"),
            (LISTED, "deploy/other.yaml", "a: 1", "other.yaml: not listed"),
            (LISTED, "deploy/daemonset.yaml", "a: [1", "deploy/daemonset.yaml: "),
            (LISTED, "deploy/daemonset.yaml", SET, "the flag `--host` is not in docs/flags.md"),
            (LISTED, "deploy/daemonset.yaml", &ports, "`ports` of a pod"),
            (PATCHED, "deploy/patch.yaml", PATCH, "the flag `--host` is not in docs/flags.md"),
            (PATCHED, "deploy/other.yaml", "a: 1", "`patch.yaml` is not there"),
        ];
        for (list, path, text, wanted) in cases {
            let found = complaints(&[(DEFAULT, list), (path, text)]);
            assert!(
                found.iter().any(|complaint| complaint.contains(wanted)),
                "{wanted}: {found:?}"
            );
        }
        assert_eq!(complaints(&[]), [format!("{DEFAULT} is not there")]);
    }

    #[test]
    fn each_folder_lists_its_own_manifests() {
        let files = [(DEFAULT, "resources: []\n"), ("deploy/admission/a.yaml", "a: 1")];
        assert!(
            complaints(&files)[0].contains("not listed in deploy/admission/kustomization.yaml")
        );
        let listed =
            [files[0], files[1], ("deploy/admission/kustomization.yaml", "resources: [a.yaml]")];
        assert_eq!(complaints(&listed), Vec::<String>::new());
    }

    #[test]
    fn a_policy_denies_or_is_complained_of() {
        let policy = |failure: &str| {
            format!(
                "kind: ValidatingAdmissionPolicy\nmetadata: {{name: p}}\nspec: {{failurePolicy: {failure}}}\n"
            )
        };
        let binding = |action: &str| {
            format!(
                "kind: ValidatingAdmissionPolicyBinding\nspec: {{policyName: p, validationActions: [{action}]}}\n"
            )
        };
        let (closed, open) = (policy("Fail"), policy("Ignore"));
        let (denies, warns) = (binding("Deny"), binding("Warn"));
        let cases = [
            (format!("{closed}---\n{denies}"), true),
            (closed.clone(), false),
            (denies.clone(), false),
            (format!("{closed}---\n{warns}"), false),
            (format!("{open}---\n{denies}"), false),
        ];
        for (text, sound) in cases {
            let files = [(DEFAULT, "resources: [p.yaml]\n"), ("deploy/p.yaml", text.as_str())];
            let found = complaints(&files);
            assert_eq!(found.is_empty(), sound, "{text}: {found:?}");
        }
    }
}
