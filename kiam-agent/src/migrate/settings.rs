//! The agent's arguments, and how they are printed: as a kustomization, as Helm's values or as they are.

use std::fmt::Write as _;

use serde_json::Value;

use super::words::{HOST_IP, NODE_NAME};

/// The arguments come in this order, and others after them.
const ORDER: [&str; 14] = [
    "host",
    "node-name",
    "port",
    "mode",
    "role-base-arn",
    "role-base-arn-autodetect",
    "namespace-policy",
    "grace-period",
    "json-log",
    "level",
    "assume-role-arn",
    "region",
    "session-duration",
    "metrics",
];

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// A kustomization beside `deploy`, with a patch.
    Kustomize,
    /// Values of the chart.
    Helm,
    /// The flags alone.
    Flags,
}

/// The configuration of the agent.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    flags: Vec<Flag>,
    /// Further variables, as entries of `env`.
    pub(super) env: Vec<Value>,
}

/// A flag; a switch has no value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Flag {
    name: String,
    value: Option<String>,
}

// === impl Settings ===

impl Settings {
    /// What `deploy/daemonset.yaml` sets for every cluster.
    pub(super) fn new() -> Self {
        let mut settings = Self { flags: Vec::new(), env: Vec::new() };
        settings.set("host", HOST_IP);
        settings.set("node-name", NODE_NAME);
        settings.set("grace-period", "30s");
        settings
    }

    /// Sets a flag, in place of another value.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.remove(name);
        self.add(name, value);
    }

    /// Sets a switch.
    pub(super) fn switch(&mut self, name: &str) {
        self.remove(name);
        self.flags.push(Flag { name: name.to_owned(), value: None });
    }

    /// Adds a flag beside others of its name.
    pub(super) fn add(&mut self, name: &str, value: &str) {
        self.flags.push(Flag { name: name.to_owned(), value: Some(value.to_owned()) });
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.flags.retain(|flag| flag.name != name);
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.flags.iter().any(|flag| flag.name == name)
    }

    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.flags.iter().find(|flag| flag.name == name)?.value.as_deref()
    }

    /// The agent's arguments.
    pub(super) fn args(&self) -> Vec<String> {
        self.sorted().into_iter().map(Flag::word).collect()
    }

    fn sorted(&self) -> Vec<&Flag> {
        let mut flags: Vec<&Flag> = self.flags.iter().collect();
        let rank = |flag: &&Flag| ORDER.iter().position(|name| *name == flag.name);
        flags.sort_by_key(|flag| rank(flag).unwrap_or(ORDER.len()));
        flags
    }

    pub(super) fn print(&self, output: Output) -> String {
        match output {
            Output::Kustomize => self.kustomization(),
            Output::Helm => self.values(),
            Output::Flags => self.args().iter().fold(String::new(), |text, arg| text + arg + "\n"),
        }
    }

    fn kustomization(&self) -> String {
        let mut text = "\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../deploy]
patches:
- target: {kind: DaemonSet, name: kiam-agent}
  patch: |-
    - op: replace
      path: /spec/template/spec/containers/0/args
      value:
"
        .to_owned();
        for arg in self.args() {
            let _ = writeln!(text, "      - {}", scalar(&arg));
        }
        for entry in &self.env {
            let _ = writeln!(
                text,
                "    - op: add\n      path: /spec/template/spec/containers/0/env/-\n      value: {entry}"
            );
        }
        text
    }

    fn values(&self) -> String {
        let mut values = String::new();
        let mut extra = Vec::new();
        for flag in self.sorted() {
            let value = flag.value.as_deref().unwrap_or_default();
            let key = match flag.name.as_str() {
                // The chart sets these by itself.
                "host" | "node-name" | "grace-period" | "role-base-arn-autodetect" | "json-log" => {
                    continue;
                }
                "mode" => "mode",
                "role-base-arn" => "roleBaseArn",
                "namespace-policy" => "namespacePolicy",
                "level" => "logLevel",
                "assume-role-arn" => "assumeRoleArn",
                "region" => "region",
                "session-duration" => "sessionDuration",
                "metrics" => {
                    match value.strip_prefix(HOST_IP).and_then(|it| it.strip_prefix(':')) {
                        Some(port) => {
                            let _ = write!(values, "metrics:\n  enabled: true\n  port: {port}\n");
                            continue;
                        }
                        None => {
                            extra.push(flag.word());
                            continue;
                        }
                    }
                }
                _ => {
                    extra.push(flag.word());
                    continue;
                }
            };
            let _ = writeln!(values, "{key}: {}", scalar(value));
        }
        let _ = writeln!(values, "jsonLog: {}", self.has("json-log"));
        list(&mut values, "extraArgs", extra.iter().map(|arg| scalar(arg)));
        list(&mut values, "extraEnv", self.env.iter().map(Value::to_string));
        values
    }
}

fn list(values: &mut String, key: &str, items: impl ExactSizeIterator<Item = String>) {
    if items.len() > 0 {
        let _ = writeln!(values, "{key}:");
    }
    for item in items {
        let _ = writeln!(values, "- {item}");
    }
}

// === impl Flag ===

impl Flag {
    fn word(&self) -> String {
        match &self.value {
            Some(value) => format!("--{}={value}", self.name),
            None => format!("--{}", self.name),
        }
    }
}

/// `text` as a YAML scalar: plain where nobody can read it as something else, otherwise in double quotes, as JSON.
fn scalar(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=(){}$,@+:*".contains(c);
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic()) || text.starts_with("--");
    let words = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let is_word = words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if begins && text.chars().all(is_plain) && !text.ends_with(':') && !is_word {
        text.to_owned()
    } else {
        Value::from(text).to_string()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings() -> Settings {
        let mut settings = Settings::new();
        settings.add("allow-path", "common");
        settings.add("allow-path", "/latest/meta-data/tags/*");
        settings.switch("json-log");
        settings.set("metrics", "$(HOST_IP):9620");
        settings.set("role-base-arn", "arn:aws:iam::123456789012:role/");
        settings.set("namespace-policy", "required");
        settings.set("session-name", "kiam-two words: #1");
        settings.env.push(json!({"name": "HTTPS_PROXY", "value": "http://proxy:3128"}));
        settings
    }

    #[test]
    fn arguments_come_in_the_order_of_the_manifest() {
        assert_eq!(
            settings().args(),
            [
                "--host=$(HOST_IP)",
                "--node-name=$(NODE_NAME)",
                "--role-base-arn=arn:aws:iam::123456789012:role/",
                "--namespace-policy=required",
                "--grace-period=30s",
                "--json-log",
                "--metrics=$(HOST_IP):9620",
                "--allow-path=common",
                "--allow-path=/latest/meta-data/tags/*",
                "--session-name=kiam-two words: #1",
            ]
        );
    }

    #[test]
    fn what_is_printed_is_read_as_what_was_meant() {
        let settings = settings();
        let kustomization: Value =
            serde_saphyr::from_str(&settings.print(Output::Kustomize)).unwrap();
        let patch: Value =
            serde_saphyr::from_str(kustomization["patches"][0]["patch"].as_str().unwrap()).unwrap();
        assert_eq!(patch[0]["value"], json!(settings.args()));
        assert_eq!(patch[1]["value"]["value"], "http://proxy:3128");
        let values: Value = serde_saphyr::from_str(&settings.print(Output::Helm)).unwrap();
        assert_eq!(
            values,
            json!({
                "roleBaseArn": "arn:aws:iam::123456789012:role/",
                "namespacePolicy": "required",
                "metrics": {"enabled": true, "port": 9620},
                "jsonLog": true,
                "extraArgs": [
                    "--allow-path=common",
                    "--allow-path=/latest/meta-data/tags/*",
                    "--session-name=kiam-two words: #1",
                ],
                "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
            })
        );
        assert_eq!(settings.print(Output::Flags).lines().count(), settings.args().len());
    }

    #[test]
    fn scalars_that_yaml_would_read_otherwise_are_quoted() {
        for (text, printed) in [
            ("--host=$(HOST_IP)", "--host=$(HOST_IP)"),
            ("required", "required"),
            ("1h", "\"1h\""),
            ("off", "\"off\""),
            ("--a=b: c", "\"--a=b: c\""),
            ("--a=\"", "\"--a=\\\"\""),
            ("-", "\"-\""),
            ("", "\"\""),
            ("a:", "\"a:\""),
        ] {
            assert_eq!(scalar(text), printed);
        }
    }
}
