//! The manifests of `deploy/` are complete, and speak of flags that exist.

use serde_json::Value;

use super::{Complaint, File, Tree};

const FOLDER: &str = "deploy/";
const LIST: &str = "deploy/kustomization.yaml";
const README: &str = "README.md";

/// Every manifest parses and is listed; nothing takes a host port; every flag of the DaemonSet is in the README.
pub(super) fn manifests_are_sound(tree: &Tree) -> Vec<Complaint> {
    let Some(list) = tree.get(LIST) else {
        return vec![format!("{LIST} is not there")];
    };
    let mut complaints = Vec::new();
    let manifests = tree
        .files
        .iter()
        .filter(|file| file.path.starts_with(FOLDER) && file.path.ends_with(".yaml"));
    let listed = listed(list);
    for name in listed.iter().filter(|name| tree.get(&format!("{FOLDER}{name}")).is_none()) {
        complaints.push(format!("{LIST}: `{name}` is not there"));
    }
    for file in manifests {
        let name = file.path.trim_start_matches(FOLDER);
        if file.path != LIST && !listed.iter().any(|listed| listed == name) {
            complaints.push(format!("{}: not listed in {LIST}", file.path));
        }
        match documents(file) {
            Ok(documents) => documents.iter().for_each(|document| {
                complaints.extend(
                    faults(document, tree)
                        .into_iter()
                        .map(|fault| format!("{}: {fault}", file.path)),
                );
            }),
            Err(error) => complaints.push(format!("{}: {error}", file.path)),
        }
    }
    complaints
}

fn documents(file: &File) -> Result<Vec<Value>, String> {
    serde_saphyr::from_multiple(&file.text).map_err(|error| error.to_string())
}

fn listed(list: &File) -> Vec<String> {
    let documents = documents(list).unwrap_or_default();
    let resources =
        documents.first().and_then(|document| document["resources"].as_array().cloned());
    resources
        .unwrap_or_default()
        .iter()
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect()
}

fn faults(document: &Value, tree: &Tree) -> Vec<String> {
    let pod = &document["spec"]["template"]["spec"];
    let containers = pod["containers"].as_array().cloned().unwrap_or_default();
    let readme = tree.get(README).map_or("", |file| file.text.as_str());
    let mut faults = Vec::new();
    for container in &containers {
        if !container["ports"].is_null() {
            faults.push(
                "`ports` of a pod in the host's network are host ports, and two agents could not \
                         be on one node during an update"
                    .to_owned(),
            );
        }
        let args = container["args"].as_array().cloned().unwrap_or_default();
        for flag in args.iter().filter_map(Value::as_str).filter_map(|arg| arg.split('=').next()) {
            if !readme.contains(&format!("`{flag}`")) && !readme.contains(&format!("`{flag}=")) {
                faults.push(format!("the flag `{flag}` is not in {README}"));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "resources:\n- daemonset.yaml\n";
    const SET: &str = "spec:\n  template:\n    spec:\n      containers:\n      - name: a\n        args: ['--host=$(HOST_IP)']\n";

    fn complaints(files: &[(&str, &str)]) -> Vec<Complaint> {
        manifests_are_sound(&Tree::of(files))
    }

    #[test]
    fn sound_manifests_pass() {
        let readme = "| `--host` | required |";
        let files = [(LIST, LISTED), ("deploy/daemonset.yaml", SET), (README, readme)];
        assert_eq!(complaints(&files), Vec::<String>::new());
    }

    #[test]
    fn each_fault_is_found() {
        let ports = format!("{SET}        ports: [{{containerPort: 1}}]\n");
        let cases = [
            (LISTED, "deploy/other.yaml", "a: 1", "`daemonset.yaml` is not there"),
            (LISTED, "deploy/other.yaml", "a: 1", "other.yaml: not listed"),
            (LISTED, "deploy/daemonset.yaml", "a: [1", "deploy/daemonset.yaml: "),
            (LISTED, "deploy/daemonset.yaml", SET, "the flag `--host` is not in README.md"),
            (LISTED, "deploy/daemonset.yaml", &ports, "`ports` of a pod"),
        ];
        for (list, path, text, wanted) in cases {
            let found = complaints(&[(LIST, list), (path, text)]);
            assert!(
                found.iter().any(|complaint| complaint.contains(wanted)),
                "{wanted}: {found:?}"
            );
        }
        assert_eq!(complaints(&[]), [format!("{LIST} is not there")]);
    }
}
