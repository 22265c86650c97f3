//! Helm and kubectl, for the tests of the chart: Helm's own code in a Python package, as no registry of packages has the program.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::command::{command, workspace};
use crate::python;

/// Where tests look for the environment, which `cargo xtask test` makes for them.
pub const VARIABLE: &str = "KIAM_TEST_HELM";
/// The chart, in the workspace.
pub const CHART: &str = "deploy/chart";

const REQUIREMENTS: &str = "xtask/chart/requirements.txt";
const DRIVER: &str = "xtask/chart/helm.py";

/// A Python environment that has both.
#[derive(Debug)]
pub struct Helm {
    folder: PathBuf,
}

/// What came of one call.
#[derive(Debug, Deserialize)]
enum Answer {
    #[serde(rename = "answer")]
    Returned(Value),
    #[serde(rename = "error")]
    Failed(String),
}

// === impl Helm ===

impl Helm {
    /// Makes the environment, and returns its folder.
    pub fn ensure() -> Result<PathBuf> {
        let folder = workspace().join("target/tools/helm");
        python::environment(&folder, REQUIREMENTS)?;
        Ok(folder)
    }

    /// The environment that `cargo xtask test` has made; `None`, with a line that says so, where a test was started otherwise.
    #[must_use]
    pub fn of_test() -> Option<Self> {
        let folder = std::env::var_os(VARIABLE).map(PathBuf::from);
        if folder.is_none() {
            eprintln!("skipped: needs Helm: cargo xtask test chart");
        }
        folder.map(|folder| Self { folder })
    }

    /// Has Helm do what the calls say: `xtask/chart/helm.py` has their names. Each returns a value, or Helm's own message.
    pub fn calls(&self, calls: &[Value]) -> Result<Vec<Result<Value, String>>> {
        let mut driver = self.program("python");
        driver.arg(workspace().join(DRIVER)).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Helm logs each file that is a link.
        driver.stderr(Stdio::piped());
        let mut driver = driver.spawn().context("cannot start Python")?;
        let mut input = driver.stdin.take().context("the driver has an input")?;
        input.write_all(&serde_json::to_vec(calls)?).context("cannot ask the driver")?;
        drop(input);
        let output = driver.wait_with_output().context("waiting for the driver")?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{DRIVER}: {}: {log}", output.status);
        let answers: Vec<Answer> =
            serde_json::from_slice(&output.stdout).context("reading the driver's answers")?;
        let result = |answer| match answer {
            Answer::Returned(value) => Ok(value),
            Answer::Failed(message) => Err(message),
        };
        Ok(answers.into_iter().map(result).collect())
    }

    /// `kubectl`.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        self.program("kubectl")
    }

    fn program(&self, name: &str) -> Command {
        let mut program = command(self.folder.join("bin").join(name));
        // Both keep in `~/.kube` what they have learnt of API servers.
        program.env("HOME", &self.folder);
        program
    }
}

/// A folder with this kustomization, in which `../../deploy` is `deploy/`.
pub fn kustomization(text: &Value) -> Result<TempDir> {
    let target = workspace().join("target");
    fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
    let folder = tempfile::tempdir_in(target).context("making a folder")?;
    fs::write(folder.path().join("kustomization.yaml"), text.to_string())
        .context("writing a kustomization")?;
    Ok(folder)
}
