//! A Python environment with the clients, of pinned versions, below `target/`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use xtask::command::{command, output_of, run, say, workspace};
use xtask::toolchain::install_packages;

const REQUIREMENTS: &str = "xtask/lab/acceptance/requirements.txt";

/// An environment that has what `requirements.txt` asks for.
#[derive(Debug)]
pub(super) struct Python {
    folder: PathBuf,
}

// === impl Python ===

impl Python {
    /// Makes the environment, or takes the one that is there if it was made from the same requirements.
    pub(super) fn ensure() -> Result<Self> {
        let python = Self { folder: workspace().join("target/acceptance/venv") };
        let wanted =
            fs::read(workspace().join(REQUIREMENTS)).context("reading the requirements")?;
        let stamp = python.folder.join("requirements.txt");
        if fs::read(&stamp).is_ok_and(|made_from| made_from == wanted) {
            return Ok(python);
        }
        say("making a Python environment with the AWS clients (about a minute, once)");
        ensure_venv()?;
        run(command("python3").args(["-m", "venv", "--clear"]).arg(&python.folder))?;
        let mut install = command(python.program("pip"));
        run(install.args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
            REQUIREMENTS,
        ]))?;
        fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
        Ok(python)
    }

    /// A program of the environment: `python`, `aws`, `moto_server`.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }
}

/// Debian's python3 can't make environments without one more package.
fn ensure_venv() -> Result<()> {
    if output_of(command("python3").args(["-c", "import ensurepip"])).is_some() {
        return Ok(());
    }
    say("installing Debian packages: python3-venv");
    install_packages(&["python3-venv"])
}
