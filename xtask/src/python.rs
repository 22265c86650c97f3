//! Python environments with packages of PyPI, of pinned versions, below `target/`: nothing of the machine is changed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::command::{command, output_of, run, workspace};
use crate::toolchain::install_packages;

/// Makes an environment in `folder` that has what `requirements`, a file of the workspace, asks for, unless one is there that was
/// made from the same.
pub fn environment(folder: &Path, requirements: &str) -> Result<()> {
    let wanted = fs::read(workspace().join(requirements))
        .with_context(|| format!("cannot read {requirements}"))?;
    let stamp = folder.join("requirements.txt");
    if fs::read(&stamp).is_ok_and(|made_from| made_from == wanted) {
        return Ok(());
    }
    ensure_venv()?;
    run(command("python3").args(["-m", "venv", "--clear"]).arg(folder))?;
    let mut install = command(folder.join("bin/pip"));
    run(install.args(["install", "--quiet", "--disable-pip-version-check", "-r", requirements]))?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

/// Debian's python3 can't make environments without one more package.
fn ensure_venv() -> Result<()> {
    if output_of(command("python3").args(["-c", "import ensurepip"])).is_some() {
        return Ok(());
    }
    install_packages(&["python3-venv"])
}
