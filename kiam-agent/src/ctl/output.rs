//! Prints what was found, for people or for programs.

use std::io::{self, Write as _};

use serde::Serialize;

use super::{cli::Form, table::Screen};
use crate::admin::ascii;

/// What a subcommand found.
pub(super) trait Report: Serialize {
    /// For people.
    fn text(&self, screen: Screen) -> String;

    /// Whether the exit status is good.
    fn is_good(&self) -> bool;

    /// The nodes that the report leaves out, each with its state. They are named on standard error.
    fn left_out(&self) -> Vec<String> {
        Vec::new()
    }
}

/// `report` in the form that was asked for. Of programs' forms each is ASCII: names and texts are others', and may be read
/// on a terminal.
pub(super) fn printed(report: &impl Report, form: Form, screen: Screen) -> String {
    match form {
        Form::Text => report.text(screen),
        Form::Json => {
            let json = serde_json::to_string_pretty(report);
            ascii(&json.expect("facts and lists of them are JSON")) + "\n"
        }
        Form::Yaml => {
            let value = serde_json::to_value(report).expect("facts and lists of them are JSON");
            let mut text = String::new();
            yaml(&mut text, &value, 0);
            text
        }
    }
}

/// Writes to standard output. A reader that has closed the pipe needs no more of it: `false`.
pub(super) fn say(text: &str) -> bool {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_ok()
}

/// `value` as YAML: mappings and lists as blocks, and strings quoted as in JSON, which is YAML, too. A library's plain
/// strings would bring what others wrote to the terminal as it is.
fn yaml(text: &mut String, value: &serde_json::Value, depth: usize) {
    use serde_json::Value;
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                *text += &format!("{:1$}", "", 2 * depth);
                *text += &key(name);
                text.push(':');
                below(text, field, depth + 1);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                *text += &format!("{:1$}-", "", 2 * depth);
                // The first field stands beside the dash.
                let mut inner = String::new();
                match item {
                    Value::Object(fields) if !fields.is_empty() => {
                        yaml(&mut inner, item, depth + 1);
                        *text += " ";
                        *text += inner.trim_start();
                    }
                    item => below(text, item, depth + 1),
                }
            }
        }
        scalar => {
            *text += &quoted(scalar);
            text.push('\n');
        }
    }
}

fn below(text: &mut String, value: &serde_json::Value, depth: usize) {
    let is_block = value.as_object().is_some_and(|it| !it.is_empty())
        || value.as_array().is_some_and(|it| !it.is_empty());
    text.push(if is_block { '\n' } else { ' ' });
    yaml(text, value, depth);
}

fn key(name: &str) -> String {
    let is_plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        && !["null", "true", "false", "yes", "no", "on", "off", "y", "n"]
            .contains(&name.to_ascii_lowercase().as_str());
    if is_plain { name.to_owned() } else { quoted(&name.into()) }
}

/// A scalar as JSON. YAML has no pairs of surrogates, but escapes of eight digits.
fn quoted(scalar: &serde_json::Value) -> String {
    let json = scalar.to_string();
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            ' '..='~' => shown.push(c),
            c => shown += &format!("\\U{:08x}", u32::from(c)),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn yaml_means_the_same_and_no_terminal_obeys_it() {
        let hostile = "a: \u{1b}[2J\u{9b}\u{202e}\n- #\u{1f980}\"\\ é";
        let value = json!({
            "nodes": [
                { "name": "n1", "on": true, "pods": 3, "empty": [], "none": null, "of": {} },
                { "deep": { "deeper": [hostile, [1, [2]], { "a": [{ "b": "c" }] }] } },
            ],
            hostile: "yes",
            "yes": "1.0",
        });
        let mut text = String::new();
        yaml(&mut text, &value, 0);
        assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{text}");
        let read: Value =
            serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(read, value, "{text}");
    }
}
