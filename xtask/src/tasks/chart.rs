//! `cargo xtask test chart`: the Helm chart of `deploy/chart`, rendered by Helm's own code, beside what kustomize makes.

use std::fs;

use anyhow::{Context, Result};

use xtask::command::{command, run, say, workspace};
use xtask::helm::{self, Helm};
use xtask::values;

/// Writes the table of values, and compares. Renders the values of `kiam-agent migrate`, too.
pub(crate) fn test() -> Result<()> {
    document()?;
    let helm = Helm::ensure()?;
    for (package, test) in [("xtask", "chart"), ("kiam-agent", "migrate")] {
        let mut tests = command("cargo");
        tests.args(["test", "--package", package, "--test", test]);
        run(tests.env(helm::VARIABLE, &helm))?;
    }
    Ok(())
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
