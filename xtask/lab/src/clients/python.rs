//! A Python environment with the clients, of pinned versions, below `target/`.

use std::path::PathBuf;

use anyhow::Result;

use xtask::command::workspace;
use xtask::python;

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
        python::environment(&python.folder, REQUIREMENTS)?;
        Ok(python)
    }

    /// A program of the environment: `python`, `aws`, `moto_server`.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }
}
