//! Whatever is printed is taken: by the agent's own parser, by kustomize, and by the chart.

use std::{fs, process::Command};

use kiam_agent::config::{self, Task, Vars};
use serde_json::{Value, json};
use xtask::helm::{CHART, Helm};

use super::{flags, installations::CASES, printed};

struct Nothing;

impl Vars for Nothing {
    fn get(&self, _: &str) -> Option<String> {
        None
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The files of the cases, and that of the documents.
fn files() -> impl Iterator<Item = &'static str> {
    CASES.iter().map(|case| case.file).chain(["old.yaml"])
}

/// The arguments of `--output=flags`.
fn arguments(file: &str) -> Vec<String> {
    let (text, _) = printed(&[file, "--output=flags"]);
    flags(&text).into_iter().map(str::to_owned).collect()
}

fn parsed(file: &str, form: &str) -> Value {
    let (text, _) = printed(&[file, &format!("--output={form}")]);
    let value = serde_saphyr::from_str(&text);
    assert!(value.is_ok(), "{file}: {value:?}: {text}");
    value.unwrap()
}

#[test]
fn the_agent_takes_the_flags() {
    for file in files() {
        let args: Vec<String> = arguments(file)
            .iter()
            .map(|arg| arg.replace("$(HOST_IP)", "10.0.0.1").replace("$(NODE_NAME)", "node-1"))
            .collect();
        match config::parse(&args, &Nothing) {
            Ok(Task::Run(_)) => {}
            other => panic!("{file}: {args:?}: {other:?}"),
        }
    }
}

#[test]
fn kustomize_applies_the_patch() {
    let folder = tempfile::tempdir().unwrap();
    let deploy = folder.path().join("deploy");
    fs::create_dir(&deploy).unwrap();
    for name in [
        "clusterrole.yaml",
        "clusterrolebinding.yaml",
        "daemonset.yaml",
        "kustomization.yaml",
        "serviceaccount.yaml",
    ] {
        let source = xtask::command::workspace().join("deploy").join(name);
        fs::copy(source, deploy.join(name)).unwrap();
    }
    let own = folder.path().join("own");
    fs::create_dir(&own).unwrap();
    for file in files() {
        let (text, _) = printed(&[file]);
        fs::write(own.join("kustomization.yaml"), &text).unwrap();
        let output = Command::new("kubectl").arg("kustomize").arg(&own).output();
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                assert!(std::env::var_os(lab::NO_SKIP).is_none(), "kubectl: {error}");
                eprintln!("skipped: kustomize_applies_the_patch: kubectl: {error}");
                return;
            }
        };
        assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
        let built = String::from_utf8(output.stdout).unwrap();
        let daemonset = built.split("\n---\n").find(|it| it.contains("kind: DaemonSet")).unwrap();
        let daemonset: Value = serde_saphyr::from_str(daemonset).unwrap();
        let container = &daemonset["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["args"], json!(arguments(file)), "{file}");
        let names: Vec<&str> = container["env"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["name"].as_str().unwrap())
            .collect();
        assert_eq!(names[..2], ["HOST_IP", "NODE_NAME"], "{file}");
        let proxies = names.contains(&"HTTPS_PROXY");
        assert_eq!(proxies, file == "kiam/v3-helm.yaml", "{file}: {names:?}");
    }
}

#[test]
fn the_charts_schema_has_all_values() {
    let schema =
        fs::read_to_string(xtask::command::workspace().join(CHART).join("values.schema.json"));
    let schema: Value = serde_json::from_str(&schema.unwrap()).unwrap();
    for file in files() {
        let values = parsed(file, "helm");
        let mistakes = mistakes(&schema, &schema, &values, "");
        assert!(mistakes.is_empty(), "{file}: {mistakes:?}");
    }
    // The check finds what is wrong.
    let wrong = json!({"rolebaseArn": "x", "jsonLog": "yes", "metrics": {"port": 0}, "mode": "off", "extraArgs": [1]});
    assert_eq!(mistakes(&schema, &schema, &wrong, "").len(), 5);
}

/// The chart, rendered by Helm with the values, has the flags of `--output=flags`, but for their order.
#[test]
fn the_chart_has_the_flags() {
    let Some(helm) = Helm::of_test() else { return };
    let chart = xtask::command::workspace().join(CHART);
    let call = |file| {
        let (chart, values) = (&chart, parsed(file, "helm"));
        json!({"do": "render", "chart": chart, "values": values, "name": "kiam-agent", "namespace": "kube-system"})
    };
    let calls: Vec<Value> = files().map(call).collect();
    for (answer, file) in helm.calls(&calls).unwrap().into_iter().zip(files()) {
        let rendered = answer.unwrap().to_string();
        for arg in arguments(file) {
            let quoted = Value::from(arg.as_str()).to_string();
            let is_there = rendered.contains(&arg) || rendered.contains(quoted.trim_matches('"'));
            assert!(is_there, "{file}: no {arg} in {rendered}");
        }
    }
}

/// An annotation is its namespace's owner's, and whoever copies the command into a shell is an administrator.
#[test]
fn a_shell_takes_the_command_for_a_namespace_as_words() {
    let folder = tempfile::tempdir().unwrap();
    let (file, ran) = (folder.path().join("namespace.yaml"), folder.path().join("ran"));
    let expression = format!("^sh'; touch {0}; `touch {0}` \"x y\"", ran.display());
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "annotations": {"iam.amazonaws.com/permitted": expression}},
    });
    fs::write(&file, namespace.to_string()).unwrap();
    let (text, _) = printed(&["kiam/v3-eks.yaml", file.to_str().unwrap()]);
    let command = text.lines().rev().find_map(|line| line.split_once("kubectl annotate"));
    let (_, words) = command.unwrap();
    let script = format!("kubectl() {{ printf '%s\\n' \"$@\"; }}\nkubectl annotate{words}");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let words = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = words.lines().collect();
    assert_eq!(words[..4], ["annotate", "--overwrite", "namespace", "shop"], "{script}");
    let body = expression.trim_start_matches('^');
    assert!(words.len() == 5 && words[4].contains(body), "{words:?}");
    assert!(!ran.exists(), "{script}");
}

/// What is wrong with `value` by the parts of JSON Schema that the chart's has, but for patterns.
fn mistakes(root: &Value, schema: &Value, value: &Value, place: &str) -> Vec<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let schema = root.pointer(reference.trim_start_matches('#')).unwrap();
        return mistakes(root, schema, value, place);
    }
    let mut found = Vec::new();
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        found.push(format!("{place}: {value} is not one of {words:?}"));
    }
    let is_of = |kind: &Value| match kind.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        kind => {
            assert_eq!(kind, "null");
            value.is_null()
        }
    };
    let kinds = match &schema["type"] {
        Value::Null => Vec::new(),
        Value::Array(kinds) => kinds.clone(),
        kind => vec![kind.clone()],
    };
    if !kinds.is_empty() && !kinds.iter().any(is_of) {
        found.push(format!("{place}: {value} is not {kinds:?}"));
    }
    let number = value.as_i64();
    if number.is_some_and(|it| schema["minimum"].as_i64().is_some_and(|least| it < least)) {
        found.push(format!("{place}: {value} is too small"));
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        match &schema["properties"][name] {
            Value::Null if schema["additionalProperties"] == json!(false) => {
                found.push(format!("{place}/{name} is not known"));
            }
            Value::Null => {}
            part => found.extend(mistakes(root, part, value, &format!("{place}/{name}"))),
        }
    }
    if let Some(items) = schema.get("items") {
        for value in value.as_array().into_iter().flatten() {
            found.extend(mistakes(root, items, value, &format!("{place}[]")));
        }
    }
    found
}
