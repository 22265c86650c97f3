//! The command line of `migrate`.

use super::{UsageError, Vars, flags::Subcommands, given, values::Mistakes};
use crate::migrate::{Input, Options, Output, Selection, Source};

/// The options of [`Subcommands::Migrate`].
pub(super) fn options(command: Subcommands, vars: &dyn Vars) -> Result<Options, UsageError> {
    let Subcommands::Migrate {
        files,
        kubeconfig,
        namespace,
        name,
        output,
        mode,
        kiam_version,
        role_base_arn,
    } = command
    else {
        return Err(UsageError(vec!["there is no such subcommand".to_owned()]));
    };
    let mut mistakes = Mistakes::default();
    let sources: Vec<Source> = files.iter().map(|file| Source::new(file)).collect();
    if sources.iter().filter(|source| **source == Source::Stdin).count() > 1 {
        mistakes.0.push("migrate: standard input (-) can be read once".to_owned());
    }
    let proxies = mistakes.proxies(vars);
    let input = if sources.is_empty() {
        let kubeconfig = kubeconfig.filter(|path| !path.is_empty()).map(Into::into);
        proxies.map(|proxies| Input::Cluster { kubeconfig, proxies: Box::new(proxies) })
    } else {
        // The flag, not the variable: the agent's own environment has that.
        if kubeconfig.is_some() && vars.get("KIAM_KUBECONFIG") != kubeconfig {
            mistakes.add("kubeconfig", "leave it out, or the files: either is read");
        }
        Some(Input::Sources(sources))
    };
    let forms =
        [("kustomize", Output::Kustomize), ("helm", Output::Helm), ("flags", Output::Flags)];
    let output = mistakes.one_of("output", &output, &forms);
    let observes = mistakes.one_of("mode", &mode, &[("enforce", false), ("observe", true)]);
    let versions = [("1", 1), ("2", 2), ("3", 3), ("4", 4)];
    let kiam_version = kiam_version.map(|text| mistakes.one_of("kiam-version", &text, &versions));
    let base = role_base_arn.map(|text| mistakes.parse("role-base-arn", &text));
    let options = || {
        Some(Options {
            input: input?,
            selection: Selection { namespace, names: name },
            output: output?,
            observes: observes?,
            kiam_version: given(kiam_version)?,
            base: given(base)?,
        })
    };
    options().filter(|_| mistakes.0.is_empty()).ok_or(UsageError(mistakes.0))
}
