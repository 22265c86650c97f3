//! What becomes of environment variables.

use serde_json::Value;

use super::{Line, Verdict, secrets, unresolved};
use crate::{
    migrate::{
        installation::Part,
        objects::{EnvValue, EnvVar},
        printable::is_all_printable,
        settings::Settings,
        words::value_of,
    },
    peers::{Program, VariableFate, variable},
};

/// Translates the variables of `part`.
pub(super) fn translate(settings: &mut Settings, part: &Part, lines: &mut Vec<Line>) {
    for var in &part.container.env {
        lines.push(verdict(settings, part, var).line(part.program, &written(var)));
    }
    for source in &part.container.env_from {
        let verdict = Verdict::no_equal(
            "its variables are not in the input: look whether the programs read one of them",
        );
        lines.push(verdict.line(part.program, &format!("envFrom {source}")));
    }
}

/// The variable for the report. Its value may be a secret.
fn written(var: &EnvVar) -> String {
    match &var.value {
        EnvValue::Text(_) => format!("env {}", var.name),
        EnvValue::Field(path) => format!("env {} ({path})", var.name),
        EnvValue::Elsewhere(source) => format!("env {} ({source})", var.name),
    }
}

fn verdict(settings: &mut Settings, part: &Part, var: &EnvVar) -> Verdict {
    let words = part.container.command.iter().chain(&part.container.args);
    let is_in_words = words.into_iter().any(|word| {
        word.contains(&format!("$({})", var.name)) || word.contains(&format!("${{{}}}", var.name))
    });
    let Some(known) = variable(&var.name) else {
        return match (&var.value, is_in_words) {
            (_, true) => {
                Verdict::unneeded("the flag that has it in its value says what becomes of it")
            }
            _ => Verdict::no_equal(
                "it is not known here: if your image reads it, find out what for; env adds it to the agent's manifest",
            ),
        };
    };
    // Of kiam's programs only the server calls AWS and the Kubernetes API.
    let calls = part.program != Program::Agent;
    match known.fate {
        VariableFate::Manifest => Verdict::kept_as(known.advice),
        VariableFate::Unneeded => Verdict::unneeded(known.advice),
        _ if !calls => Verdict::unneeded("kiam's agents call neither AWS nor the Kubernetes API"),
        VariableFate::Flag(to) => flag(settings, part, var, to),
        VariableFate::Environment => environment(settings, var, known.advice),
    }
}

/// Whether all texts of `entry` are printed as they are. JSON escapes some that YAML then has again.
fn is_all_printable_within(entry: &Value) -> bool {
    match entry {
        Value::String(text) => is_all_printable(text),
        Value::Array(items) => items.iter().all(is_all_printable_within),
        Value::Object(map) => {
            map.iter().all(|(name, value)| is_all_printable(name) && is_all_printable_within(value))
        }
        _ => true,
    }
}

fn flag(settings: &mut Settings, part: &Part, var: &EnvVar, to: &str) -> Verdict {
    let value = value_of(&var.name, &part.container.env);
    if unresolved(&value).is_some() {
        return Verdict::no_equal(format!("its value is not in the input: set --{to} yourself"));
    }
    if value.is_empty() {
        return Verdict::unneeded("it is empty");
    }
    if !is_all_printable(&value) || secrets::has_password(&value) {
        return Verdict::no_equal(format!(
            "its value has a password, or characters that are not printed: set --{to} yourself"
        ));
    }
    match settings.value(to) {
        Some(set) if set == value => Verdict::unneeded(format!("--{to} says the same")),
        Some(set) => Verdict::unneeded(format!("--{to}={set} counts")),
        None => {
            settings.set(to, &value);
            Verdict::renamed(format!("--{to}={value}"))
        }
    }
}

fn environment(settings: &mut Settings, var: &EnvVar, advice: &str) -> Verdict {
    if let EnvValue::Text(text) = &var.value
        && secrets::is_secret(&var.name, text)
    {
        return Verdict::no_equal(format!(
            "it is a secret, and is not copied: put it into a Secret of the agent's namespace, and add \
             {{name: {}, valueFrom: {{secretKeyRef: {{name: SECRET, key: KEY}}}}}}; {advice}",
            var.name
        ));
    }
    if !is_all_printable_within(&var.entry) {
        return Verdict::no_equal(
            "it has characters that are not printed: add it to the agent's manifest yourself",
        );
    }
    let is_there = settings.env.iter().any(|entry: &Value| entry["name"] == var.name.as_str());
    if !is_there {
        settings.env.push(var.entry.clone());
    }
    match &var.value {
        EnvValue::Elsewhere(source) => Verdict::no_equal(format!(
            "kept, but {source} must be in the agent's namespace, too: copy it, or leave the variable out; {advice}"
        )),
        _ => Verdict::kept_as(advice),
    }
}
