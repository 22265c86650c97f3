//! Debian's Prometheus, for the tests of metrics, alerts and the dashboard. The package is unpacked below `target/tools` and not
//! installed, so that no service starts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{command, run, say, workspace};

/// An unpacked package.
#[derive(Debug)]
pub struct Prometheus {
    folder: PathBuf,
}

// === impl Prometheus ===

impl Prometheus {
    /// Unpacks it, unless it is there; where there is no Debian or no network, the tests that need it say so.
    pub fn ensure() {
        if Self::unpacked().is_some() || !Path::new("/usr/bin/apt-get").exists() {
            return;
        }
        say("unpacking Debian's prometheus into target/tools (19 MB, once)");
        if let Err(error) = unpack(&folder()) {
            say(format!("no Prometheus to be had: {error:#}"));
        }
    }

    /// The package, if [`Self::ensure`] has unpacked it.
    #[must_use]
    pub fn unpacked() -> Option<Self> {
        let found = Self { folder: folder() };
        found.program("promtool").is_file().then_some(found)
    }

    /// `promtool`.
    #[must_use]
    pub fn promtool(&self) -> Command {
        command(self.program("promtool"))
    }

    /// The path of `prometheus` or `promtool`.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("usr/bin").join(name)
    }
}

fn folder() -> PathBuf {
    workspace().join("target/tools/prometheus")
}

fn unpack(folder: &Path) -> Result<()> {
    let parent = folder.parent().context("a folder of tools has a parent")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let work = tempfile::tempdir_in(parent).context("making a folder")?;
    // As root, apt downloads as another user, who may not write here.
    let download = || {
        let mut apt = command("apt-get");
        apt.current_dir(work.path()).args(["-o", "APT::Sandbox::User=root"]);
        run(apt.args(["download", "prometheus"]))
    };
    if download().is_err() {
        say("the package lists may be old or absent: updating them and trying once more");
        run(command("apt-get").arg("update"))?;
        download()?;
    }
    let entries = fs::read_dir(work.path()).context("reading the folder")?.flatten();
    let mut packages = entries.map(|entry| entry.path());
    let Some(package) = packages.find(|path| path.extension().is_some_and(|it| it == "deb")) else {
        bail!("apt-get has downloaded no package");
    };
    // Renamed once it is whole, so that a folder of this name can be used.
    let whole = work.path().join("whole");
    run(command("dpkg-deb").arg("--extract").arg(package).arg(&whole))?;
    fs::rename(&whole, folder).with_context(|| format!("making {}", folder.display()))
}
