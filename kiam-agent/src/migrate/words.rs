//! From a container's command, arguments and variables to the words that its program gets, and from these to flags.

use std::collections::HashMap;

use super::objects::{Container, EnvValue, EnvVar};
use crate::peers::{self, Releases};

/// Shells, whose `-c` is a script.
const SHELLS: [&str; 5] = ["sh", "ash", "bash", "dash", "busybox"];
/// The longest word that comes of variables, in bytes.
const MAX_WORD: usize = 64 << 10;
/// The most that all variables and words of a container come to.
const MAX_EXPANDED: usize = 1 << 20;
/// The node's address and name, as the agent's manifest has them.
pub(super) const HOST_IP: &str = "$(HOST_IP)";
pub(super) const NODE_NAME: &str = "$(NODE_NAME)";

/// A flag as it is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// The flag's name, without dashes and without `no-`.
    pub(super) name: String,
    /// Its value; of a switch `true` or `false`.
    pub(super) value: String,
    /// As the manifest has it.
    pub(super) written: String,
    /// Whether a release of the program has the flag.
    pub(super) is_known: bool,
}

/// The words of `container`'s command line, with its variables in their places.
pub(super) fn command_line(container: &Container) -> Vec<String> {
    let mut variables = Variables::of(&container.env);
    let words = container.command.iter().chain(&container.args);
    let words: Vec<String> = words.map(|word| variables.expand(word)).collect();
    script(&words).unwrap_or(words)
}

/// The words of `container`'s command line as they are written.
pub(super) fn written_line(container: &Container) -> Vec<String> {
    let words: Vec<String> = container.command.iter().chain(&container.args).cloned().collect();
    script(&words).unwrap_or(words)
}

/// The last path component of a word.
pub(super) fn base_name(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

/// The variables of a container with their values, each expanded once and in order, as the kubelet does it.
struct Variables<'a> {
    values: HashMap<&'a str, String>,
    /// How many bytes expansion may still write.
    left: usize,
}

// === impl Variables ===

impl<'a> Variables<'a> {
    fn of(env: &'a [EnvVar]) -> Self {
        let mut variables = Self { values: HashMap::new(), left: MAX_EXPANDED };
        for variable in env {
            let name = variable.name.as_str();
            let value = match &variable.value {
                // Only earlier ones are expanded in it.
                EnvValue::Text(text) => variables.expand(text),
                EnvValue::Field(path) if path == "status.hostIP" || path == "status.podIP" => {
                    HOST_IP.to_owned()
                }
                EnvValue::Field(path) if path == "spec.nodeName" => NODE_NAME.to_owned(),
                EnvValue::Field(_) | EnvValue::Elsewhere(_) => format!("$({name})"),
            };
            // A later entry takes precedence.
            variables.values.insert(name, value);
        }
        variables
    }

    /// The value of a variable.
    fn value(&self, name: &str) -> String {
        self.values.get(name).cloned().unwrap_or_else(|| format!("$({name})"))
    }

    /// `text` with each `$(NAME)` replaced: `$$` stands for `$`, and a name that is not known stays. A word that becomes
    /// too long stays as it is: few variables that repeat each other would fill the memory.
    fn expand(&mut self, text: &str) -> String {
        if !text.contains('$') {
            return text.to_owned();
        }
        match self.expanded(text, self.left.min(MAX_WORD)) {
            Some(expanded) => {
                self.left -= expanded.len().min(self.left);
                expanded
            }
            None => text.to_owned(),
        }
    }

    /// `None` of a text that gets longer by expansion, and longer than `most`.
    fn expanded(&self, text: &str, most: usize) -> Option<String> {
        let most = most.max(text.len());
        let (mut expanded, mut rest) = (String::new(), text);
        while let Some(at) = rest.find('$') {
            expanded.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("$$") {
                expanded.push('$');
                rest = after;
                continue;
            }
            let name = rest.strip_prefix("$(").and_then(|inner| inner.split_once(')'));
            match name {
                Some((name, after)) => {
                    expanded.push_str(&self.value(name));
                    rest = after;
                }
                None => {
                    expanded.push('$');
                    rest = &rest[1..];
                }
            }
            if expanded.len() > most {
                return None;
            }
        }
        (expanded.len() + rest.len() <= most).then(|| expanded + rest)
    }
}

/// The value of a variable in the container, where the agent's own manifest has the same `$(NAME)`.
pub(super) fn value_of(name: &str, env: &[EnvVar]) -> String {
    Variables::of(env).value(name)
}

/// The words of the last command in a shell's script, if the words start a shell.
fn script(words: &[String]) -> Option<Vec<String>> {
    let shell = words.iter().position(|word| SHELLS.contains(&base_name(word)))?;
    let option = words[shell..]
        .iter()
        .position(|word| word.starts_with('-') && !word.starts_with("--") && word.ends_with('c'))?;
    let script = words.get(shell + option + 1)?;
    let commands = shell_words(script);
    let program =
        |word: &String| ["kiam", "kube2iam", "agent", "server"].contains(&base_name(word));
    let command = commands.into_iter().rev().find(|words| words.iter().any(program))?;
    let first = command.iter().position(program)?;
    Some(command[first..].to_vec())
}

/// The commands of a script, split into words as a shell does it, without its more unusual syntax.
fn shell_words(script: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = script.chars().peekable();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => match chars.next() {
                Some('\n') | None => {}
                Some(next) => word.get_or_insert_default().push(next),
            },
            (None | Some('"'), '$') => {
                word.get_or_insert_default().push_str(&parameter(&mut chars));
            }
            (None, ' ' | '\t' | '\n' | ';' | '&' | '|') => {
                if let (Some(word), Some(command)) = (word.take(), commands.last_mut()) {
                    command.push(word);
                }
                if c != ' ' && c != '\t' {
                    commands.push(Vec::new());
                }
            }
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if let (Some(word), Some(command)) = (word, commands.last_mut()) {
        command.push(word);
    }
    commands
}

/// A parameter of the shell, as the kubelet writes a variable: `$NAME` and `${NAME}` are `$(NAME)`.
fn parameter(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> String {
    let braced = chars.next_if_eq(&'{').is_some();
    let mut name = String::new();
    while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
        name.push(c);
    }
    if braced {
        // A default after `:-` is left out: the variable is set in the manifest.
        while chars.next_if(|c| *c != '}').is_some() {}
        chars.next();
    }
    if name.is_empty() { "$".to_owned() } else { format!("$({name})") }
}

/// The flags among `words`, of a program of `releases`, and the words that are none.
pub(super) fn settings(words: &[String], releases: Releases) -> (Vec<Setting>, Vec<String>) {
    let (mut settings, mut others) = (Vec::new(), Vec::new());
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        if word == "-d" && releases.intersects(Releases::KIAM_1) {
            settings.push(Setting::new("debug", "true", word, true));
            continue;
        }
        let Some(flag) = word.strip_prefix("--").filter(|flag| !flag.is_empty()) else {
            others.push(word.clone());
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let negated = name
            .strip_prefix("no-")
            .filter(|name| peers::flag(name, releases).is_some_and(|known| known.switch));
        let known = peers::flag(negated.unwrap_or(name), releases);
        let setting = match (known, negated, value) {
            (_, Some(name), _) => Setting::new(name, "false", word, true),
            (Some(known), None, None) if known.switch => Setting::new(name, "true", word, true),
            (_, None, Some(value)) => Setting::new(name, value, word, known.is_some()),
            // A flag of a program that is not known may be a switch.
            (_, None, None) => match words.next_if(|next| !next.starts_with("--")) {
                Some(value) => {
                    Setting::new(name, value, &format!("{word} {value}"), known.is_some())
                }
                None => Setting::new(name, "", word, known.is_some()),
            },
        };
        settings.push(setting);
    }
    (settings, others)
}

// === impl Setting ===

impl Setting {
    fn new(name: &str, value: &str, written: &str, is_known: bool) -> Self {
        let (name, value, written) = (name.to_owned(), value.to_owned(), written.to_owned());
        Self { name, value, written, is_known }
    }

    /// Whether a switch is on.
    pub(super) fn is_on(&self) -> bool {
        matches!(self.value.as_str(), "true" | "1" | "t" | "T" | "TRUE" | "True")
    }
}

/// `word` for a shell. Annotations may be anybody's, and commands with them are copied into an operator's shell.
pub(super) fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./+:=,@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn variable(name: &str, value: EnvValue) -> EnvVar {
        EnvVar { name: name.to_owned(), value, entry: Value::Null }
    }

    fn line(command: &[&str], args: &[&str], env: Vec<EnvVar>) -> String {
        let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let (command, args) = (own(command), own(args));
        command_line(&Container { command, args, env, ..Container::default() }).join(" ")
    }

    #[test]
    fn a_shell_reads_what_is_quoted_as_one_word() {
        for word in [
            "", "a", "cali+", "a b", "it's", "'", "$(x)", "`x`", "\\", "\"", "!a", "^a|b$", "~",
            "*",
        ] {
            let script = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word, "{script}");
        }
        assert_eq!(quoted("arn:aws:iam::1:role/a"), "arn:aws:iam::1:role/a");
    }

    #[test]
    fn variables_are_expanded_as_the_kubelet_does_it() {
        let env = || {
            vec![
                variable("IP", EnvValue::Field("status.podIP".to_owned())),
                variable("PORT", EnvValue::Text("8181".to_owned())),
                variable("AT", EnvValue::Text("$(IP):$(PORT)/$(LATER)".to_owned())),
                variable("LATER", EnvValue::Text("x".to_owned())),
                variable("SECRET", EnvValue::Elsewhere("Secret a".to_owned())),
            ]
        };
        let args = ["--a=$(AT)", "--b=$$(PORT)", "--c=$(NONE)", "--d=$(SECRET)", "$", "$(x"];
        assert_eq!(
            line(&[], &args, env()),
            "--a=$(HOST_IP):8181/$(LATER) --b=$(PORT) --c=$(NONE) --d=$(SECRET) $ $(x"
        );
    }

    #[test]
    fn variables_that_repeat_each_other_are_expanded_within_bounds() {
        let text = |text: String| EnvValue::Text(text);
        let doubling: Vec<EnvVar> = (0..60)
            .map(|n| match n {
                0 => variable("A0", text("xxxxxxxx".to_owned())),
                n => variable(&format!("A{n}"), text(format!("$(A{0})$(A{0})", n - 1))),
            })
            .collect();
        assert_eq!(line(&[], &["$(A3)"], doubling.clone()), "x".repeat(64));
        let words: Vec<String> = (0..60).map(|n| format!("$(A{n})")).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let found = line(&words, &[], doubling);
        assert!(found.split(' ').all(|word| word.len() <= MAX_WORD), "{}", found.len());
        assert!(found.len() <= MAX_EXPANDED, "{}", found.len());
        let chain: Vec<EnvVar> = (0..30_000)
            .map(|n| match n {
                0 => variable("A0", text("x".to_owned())),
                n => variable(&format!("A{n}"), text(format!("$(A{})", n - 1))),
            })
            .collect();
        assert_eq!(line(&[], &["$(A29999)"], chain.clone()), "x");
        assert_eq!(value_of("A29999", &chain), "x");
        // What is long by itself is not cut.
        let long = "y".repeat(MAX_WORD + 1);
        assert_eq!(line(&[], &[&long], Vec::new()), long);
    }

    #[test]
    fn a_shells_script_is_split_as_the_shell_does_it() {
        let script = "set -e; sleep 1 && exec /kiam agent --host=$HOST_IP --level 'in'\"fo\" \\\n --session=a\\ b";
        let found = line(&["/bin/sh"], &["-ec", script], Vec::new());
        assert_eq!(found, "/kiam agent --host=$(HOST_IP) --level info --session=a b");
        let braced = "kube2iam --node=${NODE_NAME:-x} --verbose";
        let found = line(&["sh", "-c", braced], &[], Vec::new());
        assert_eq!(found, "kube2iam --node=$(NODE_NAME) --verbose");
        // No program of theirs in it: left as it is.
        assert_eq!(line(&["sh", "-c", "sleep 1"], &[], Vec::new()), "sh -c sleep 1");
    }

    #[test]
    fn flags_take_values_both_ways_and_switches_none() {
        let words = "agent --iptables --host-interface cali+ --port=8181 --no-iptables-remove --json-log \
                     --new x --newer --level=info";
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let (settings, others) = settings(&words, Releases::AGENT);
        let found: Vec<_> =
            settings.iter().map(|it| (it.name.as_str(), it.value.as_str(), it.is_known)).collect();
        let expected = [
            ("iptables", "true", true),
            ("host-interface", "cali+", true),
            ("port", "8181", true),
            ("iptables-remove", "false", true),
            ("json-log", "true", true),
            ("new", "x", false),
            ("newer", "", false),
            ("level", "info", true),
        ];
        assert_eq!(found, expected);
        assert_eq!(others, ["agent"]);
        assert_eq!(settings[1].written, "--host-interface cali+");
    }
}
