//! Finds all unknown and incomplete flags, of which clap reports only the first, and adds the environment's flags.

use std::collections::HashSet;

use clap::{Arg, Command, CommandFactory as _};

use super::{Vars, flags::CommandLine, variables::Variables};
use crate::peers;

/// The arguments that clap accepts, and the mistakes of the others.
#[derive(Debug, Default)]
pub(super) struct ScanResult {
    pub(super) arguments: Vec<String>,
    pub(super) mistakes: Vec<String>,
    /// The mistake of a subcommand that is unknown or does not come first, which is reported alone.
    pub(super) subcommand: Option<String>,
    /// What the environment has instead of flags.
    pub(super) variables: Variables,
}

/// Scans `arguments` (without the program's name) for `command`, and adds flags from `vars`.
pub(super) fn scan(command: &Command, arguments: &[String], vars: &dyn Vars) -> ScanResult {
    let mut scanned =
        ScanResult { arguments: vec!["kiam-agent".to_owned()], ..ScanResult::default() };
    let mut given = HashSet::new();
    // The flags that the agent lacks are nothing to whoever misspelled `status`.
    if let Some(word) = arguments.first()
        && !word.starts_with('-')
        && peers::advice(word).is_none()
    {
        scanned.subcommand = Some(unexpected(word));
    }
    let mut words = arguments.iter().peekable();
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--") else {
            if command.find_subcommand(word).is_some() {
                scanned.subcommand = Some(format!(
                    "{word}: a subcommand comes first, before its flags: kiam-agent {word} …"
                ));
            }
            scanned.mistakes.push(unexpected(word));
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let Some(known) = find(command, name) else {
            scanned.mistakes.push(unexpected(&format!("--{name}")));
            if value.is_none() && words.peek().is_some_and(|next| !next.starts_with("--")) {
                words.next();
            }
            continue;
        };
        if !given.insert(name.to_owned()) && !repeatable(known) {
            scanned.mistakes.push(format!("--{name}: it is set more than once"));
            continue;
        }
        if value.is_some() || optional(known) {
            scanned.arguments.push(word.clone());
        } else if let Some(value) = words.next_if(|next| !next.starts_with("--")) {
            scanned.arguments.push(format!("--{name}={value}"));
        } else {
            scanned.mistakes.push(format!("--{name}: a value must follow"));
        }
    }
    let absent = command.get_arguments().filter_map(Arg::get_long);
    for flag in absent.filter(|flag| !given.contains(*flag)) {
        scanned.arguments.extend(scanned.variables.argument(flag, vars));
    }
    scanned
}

fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(name))
}

fn repeatable(arg: &Arg) -> bool {
    matches!(arg.get_action(), clap::ArgAction::Append)
}

/// Whether the flag's value is optional.
fn optional(arg: &Arg) -> bool {
    arg.get_num_args().is_some_and(|count| count.min_values() == 0)
        || !arg.get_action().takes_values()
}

fn unexpected(word: &str) -> String {
    match peers::advice(word) {
        Some(advice) => format!("{word}: a flag of kiam or kube2iam; {advice}"),
        None if word.starts_with("--") => format!("{word}: there is no such flag"),
        None => {
            format!("{word:?}: there is no such subcommand; the subcommands are {}", subcommands())
        }
    }
}

fn subcommands() -> String {
    let command = CommandLine::command();
    let shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    shown.map(Command::get_name).collect::<Vec<_>>().join(", ")
}
