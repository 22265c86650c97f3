//! Parses `preflight`, which takes the agent's flags beside its own.

use super::{Config, Output, Task, UsageError, Vars, config, values::Mistakes};
use kiam_core::role::{RoleArn, Source};

/// The subcommand's name.
pub(super) const SUBCOMMAND: &str = "preflight";
/// What separates the agent's flags, for those who like to see where they begin.
const SEPARATOR: &str = "--";

/// What to check, and how to print it.
#[derive(Debug)]
pub struct Preflight {
    /// The configuration of the agent that is to run.
    pub config: Config,
    /// `--output`.
    pub output: Output,
    /// `--try-role`.
    pub roles: Vec<RoleArn>,
}

/// The flags of the subcommand itself, as text, and the rest.
#[derive(Debug, Default)]
struct OwnFlags {
    output: Option<String>,
    roles: Vec<String>,
    rest: Vec<String>,
}

/// The task of `arguments`, which follow the subcommand's name.
pub(super) fn parse(arguments: &[String], vars: &dyn Vars) -> Result<Task, UsageError> {
    let mut mistakes = Mistakes::default();
    let own = OwnFlags::take(arguments, &mut mistakes);
    let words = [("text", Output::Text), ("json", Output::Json)];
    let output = own.output.as_deref().unwrap_or("text");
    let output = mistakes.one_of("output", output, &words);
    let roles = mistakes.all("try-role", &own.roles);
    let config = config(&own.rest, vars);
    let config = config.map_err(|UsageError(others)| mistakes.0.extend(others)).ok();
    if let (Some(config), false) = (&config, own.roles.is_empty())
        && config.sts.source == Source::WebIdentity
    {
        mistakes.add(
            "try-role",
            "leave it out with --credential-source=web-identity: a role is assumed with a pod's token",
        );
    }
    match (config, output, roles) {
        (Some(config), Some(output), Some(roles)) if mistakes.0.is_empty() => {
            Ok(Task::Preflight(Box::new(Preflight { config, output, roles })))
        }
        _ => Err(UsageError(mistakes.0)),
    }
}

// === impl OwnFlags ===

impl OwnFlags {
    fn take(arguments: &[String], mistakes: &mut Mistakes) -> Self {
        let mut own = Self::default();
        let mut words = arguments.iter().filter(|word| *word != SEPARATOR).peekable();
        while let Some(word) = words.next() {
            let (flag, value) = match word.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            if !matches!(flag, "--output" | "--try-role") {
                own.rest.push(word.clone());
                continue;
            }
            let value = value.or_else(|| words.next_if(|next| !next.starts_with("--")).cloned());
            match (flag, value) {
                ("--output", Some(value)) => {
                    if own.output.replace(value).is_some() {
                        mistakes.add("output", "it is set more than once");
                    }
                }
                (_, Some(value)) => own.roles.push(value),
                (flag, None) => mistakes.add(&flag[2..], "a value must follow"),
            }
        }
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoVars;

    impl Vars for NoVars {
        fn get(&self, _: &str) -> Option<String> {
            None
        }

        fn names(&self) -> Vec<String> {
            Vec::new()
        }
    }

    fn parsed(line: &str) -> Result<Preflight, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match super::super::parse(&words, &NoVars) {
            Ok(Task::Preflight(preflight)) => Ok(*preflight),
            Ok(task) => Err(format!("{task:?}")),
            Err(mistakes) => Err(mistakes.to_string()),
        }
    }

    const ROLE: &str = "arn:aws:iam::123456789012:role/reader";
    const AGENT: &str = "--host=10.0.0.1 --role-base-arn=arn:aws:iam::123456789012:role/";

    #[test]
    fn the_agents_flags_are_its_own_flags_wherever_they_stand() {
        for line in [
            format!("preflight {AGENT} --path=node"),
            format!("preflight -- {AGENT} --path node"),
            format!("preflight --output=text {AGENT} --path=node"),
        ] {
            let preflight = parsed(&line).unwrap();
            let config = preflight.config;
            assert_eq!((preflight.output, config.port), (Output::Text, 3100), "{line}");
            let path = config.intercept.unwrap().path;
            assert_eq!(path, kiam_kernel::intercept::ListenerPath::Node, "{line}");
        }
        for line in [
            format!("preflight --output json --try-role {ROLE} {AGENT} --try-role={ROLE}2"),
            format!("preflight {AGENT} --output=json --try-role={ROLE} -- --try-role {ROLE}2"),
        ] {
            let preflight = parsed(&line).unwrap();
            assert_eq!(preflight.output, Output::Json);
            let roles: Vec<_> = preflight.roles.iter().map(ToString::to_string).collect();
            assert_eq!(roles, [ROLE.to_owned(), format!("{ROLE}2")]);
        }
    }

    #[test]
    fn mistakes_of_both_are_reported_at_once() {
        let mistakes = parsed(&format!(
            "preflight --output=xml --output=json --try-role=reader --try-role {AGENT} --port=99999"
        ))
        .unwrap_err();
        for part in [
            "--output: it is set more than once",
            "--try-role: \"reader\"",
            "--try-role: a value must follow",
            "--port: \"99999\" is not a port",
        ] {
            assert!(mistakes.contains(part), "{part}: {mistakes}");
        }
        let mistakes = parsed("preflight --output=xml").unwrap_err();
        assert!(mistakes.contains("--output: \"xml\" is not one of text, json"), "{mistakes}");
        assert!(mistakes.contains("--host: it is required"), "{mistakes}");
        let web =
            format!("preflight --host=10.0.0.1 --credential-source=web-identity --try-role={ROLE}");
        assert!(parsed(&web).unwrap_err().starts_with("--try-role: leave it out"), "{web}");
    }
}
