//! Parses the subcommands.

use clap::Parser as _;

use super::{
    Output, PodName, StatusForm, Task, UsageError, Vars,
    flags::{CommandLine, Subcommands},
    migration,
    values::Mistakes,
    variables::Variables,
};
use kiam_kernel::guard::BootText;

/// The task of `arguments` with a subcommand.
pub(super) fn parse(arguments: &[String], vars: &dyn Vars) -> Result<Task, UsageError> {
    let mut words = vec!["kiam-agent".to_owned()];
    words.extend_from_slice(arguments);
    // Flags that must match the agent's, which may be set in its environment.
    let shared: &[_] = match arguments.first().map(String::as_str) {
        Some("uninstall") => &["bpffs", "state-dir", "boot-guard"],
        Some("boot-guard") => &["guard-preference"],
        Some("status" | "explain" | "pods" | "refresh") => &["state-dir"],
        Some("migrate") => &["kubeconfig"],
        _ => &[],
    };
    let mut variables = Variables::default();
    for flag in shared {
        if !arguments.iter().any(|word| word.starts_with(&format!("--{flag}"))) {
            words.extend(variables.argument(flag, vars));
        }
    }
    understood(words, vars).map_err(|UsageError(mistakes)| UsageError(variables.named(mistakes)))
}

fn understood(words: Vec<String>, vars: &dyn Vars) -> Result<Task, UsageError> {
    match CommandLine::try_parse_from(words) {
        Ok(CommandLine {
            command: Some(Subcommands::Uninstall { bpffs, state_dir, boot_guard, force }),
            ..
        }) => Ok(Task::Uninstall {
            bpffs: bpffs.into(),
            state_dir: state_dir.into(),
            boot_guard: boot_guard.filter(|folder| !folder.is_empty()).map(Into::into),
            force,
        }),
        Ok(CommandLine {
            command: Some(Subcommands::BootGuard { what, guard_preference }),
            ..
        }) => boot_text(&what, &guard_preference),
        Ok(CommandLine { command: Some(command @ Subcommands::Migrate { .. }), .. }) => {
            migration::options(command, vars).map(|options| Task::Migrate(Box::new(options)))
        }
        Ok(CommandLine { command: Some(Subcommands::SelftestClient), .. }) => {
            Ok(Task::SelftestClient)
        }
        Ok(CommandLine { command: Some(Subcommands::Pause), .. }) => Ok(Task::Pause),
        Ok(CommandLine {
            command: Some(Subcommands::Status { live, ready, output, state_dir }),
            ..
        }) => {
            let page = output_of(&output)?;
            let form = match (live, ready) {
                (true, _) => StatusForm::Live,
                (_, true) => StatusForm::Ready,
                _ => StatusForm::Page(page),
            };
            Ok(Task::Status { form, state_dir: state_dir.into() })
        }
        Ok(CommandLine {
            command: Some(Subcommands::Explain { pod, output, state_dir }), ..
        }) => {
            let output = output_of(&output)?;
            of_pod(&pod, |pod| Task::Explain { pod, output, state_dir: state_dir.into() })
        }
        Ok(CommandLine { command: Some(Subcommands::Pods { state_dir }), .. }) => {
            Ok(Task::Pods { state_dir: state_dir.into() })
        }
        Ok(CommandLine { command: Some(Subcommands::Refresh { pod, state_dir }), .. }) => {
            of_pod(&pod, |pod| Task::Refresh { pod, state_dir: state_dir.into() })
        }
        Ok(_) => Err(UsageError(vec!["there is no such subcommand".to_owned()])),
        Err(error) if !error.use_stderr() => Ok(Task::Print(error.to_string())),
        Err(error) => Err(UsageError(vec![error.to_string()])),
    }
}

fn boot_text(what: &str, preference: &str) -> Result<Task, UsageError> {
    let text = match what {
        "unit" => BootText::Unit,
        "script" => BootText::Script,
        "user-data" => BootText::UserData,
        _ => {
            let mistake = format!("boot-guard: {what:?} is not one of unit, script, user-data");
            return Err(UsageError(vec![mistake]));
        }
    };
    let mut mistakes = Mistakes::default();
    let preference = mistakes.guard_preference(preference);
    let printed = preference.map(|preference| text.text(preference));
    printed.map(Task::Print).ok_or(UsageError(mistakes.0))
}

fn output_of(text: &str) -> Result<Output, UsageError> {
    let mut mistakes = Mistakes::default();
    let forms = [("text", Output::Text), ("json", Output::Json)];
    mistakes.one_of("output", text, &forms).ok_or(UsageError(mistakes.0))
}

fn of_pod(pod: &str, task: impl FnOnce(PodName) -> Task) -> Result<Task, UsageError> {
    pod.parse().map(task).map_err(|mistake| UsageError(vec![mistake]))
}
