//! `cargo xtask test chart`: the Helm chart of `deploy/chart`, rendered by Helm's own code, beside what kustomize makes.

use std::fs;

use anyhow::{Context, Result};

use xtask::command::{command, run, say, workspace};
use xtask::helm::{self, Helm};
use xtask::values;

/// Writes the table of values, and compares; then renders the values of `kiam-agent migrate`, and asks both programs of the
/// documents' commands.
pub(crate) fn test() -> Result<()> {
    document()?;
    let helm = Helm::ensure()?;
    let test = |words: &[&str]| run(command("cargo").args(words).env(helm::VARIABLE, &helm));
    test(&["test", "--package", "xtask", "--test", "chart"])?;
    test(&["test", "--package", "kiam-agent", "--test", "migrate"])?;
    test(&["test", "--package", "kiam-agent", "--test", "commands", "--", "kubectl", "helm"])
}

fn document() -> Result<()> {
    let path = |name: &str| workspace().join(helm::CHART).join(name);
    let read =
        |name: &str| fs::read_to_string(path(name)).with_context(|| format!("reading {name}"));
    let readme = read("README.md")?;
    let wanted = values::documented(&readme, &read("values.yaml")?).map_err(anyhow::Error::msg)?;
    if wanted == readme {
        return Ok(());
    }
    say(format!("writing the table of {}", path("README.md").display()));
    fs::write(path("README.md"), wanted).context("writing the table")
}
