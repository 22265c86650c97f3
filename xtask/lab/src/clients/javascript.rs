//! The part of the AWS SDK for JavaScript that asks for credentials, of a pinned version, below `target/`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use xtask::command::{command, run, workspace};
use xtask::toolchain::ensure_npm;

/// `fromInstanceMetadata` of the SDK, version 3, comes from here.
const PACKAGE: &str = "@smithy/credential-provider-imds@4.5.2";

/// A folder with the package.
#[derive(Debug)]
pub(super) struct JavaScript {
    pub(super) folder: PathBuf,
}

// === impl JavaScript ===

impl JavaScript {
    /// Installs the package, unless it is there.
    pub(super) fn ensure() -> Result<Self> {
        let javascript = Self { folder: workspace().join("target/acceptance/javascript") };
        let stamp = javascript.folder.join("package");
        if fs::read_to_string(&stamp).is_ok_and(|installed| installed == PACKAGE) {
            return Ok(javascript);
        }
        ensure_npm()?;
        let folder = &javascript.folder;
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let mut install = command("npm");
        install.args(["install", "--silent", "--no-fund", "--no-audit", "--prefix"]);
        run(install.arg(folder).arg(PACKAGE))?;
        fs::write(&stamp, PACKAGE).with_context(|| format!("cannot write {}", stamp.display()))?;
        Ok(javascript)
    }
}
