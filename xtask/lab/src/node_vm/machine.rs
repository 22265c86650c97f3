//! The node from outside: a kernel in a process, which is started on one disk again and again, and killed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use tokio::time::Instant;

use super::{Life, Outcome};
use xtask::command::{command, workspace};

/// What the guest writes as the last line of its report.
pub(super) const END: &str = "end";
/// In the folder that is shared with the guest: which life this is, and what it reports.
pub(super) const LIFE: &str = "life";
pub(super) const REPORT: &str = "report";

const STEP: Duration = Duration::from_millis(200);

/// What a node is made of.
#[derive(Debug)]
pub(super) struct Machine {
    /// What `build.sh` made.
    node: PathBuf,
    /// What changes of it, and what it shares.
    run: TempDir,
}

/// A running kernel. Drop is a loss of power.
#[derive(Debug)]
struct Running(Child);

// === impl Machine ===

impl Machine {
    /// A new one, with its files in a folder of its own below `folder`.
    pub(super) fn new(node: PathBuf, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let run = TempDir::with_prefix_in("node-vm-", folder).context("making a folder")?;
        let machine = Self { node, run };
        fs::create_dir(machine.shared()).context("making the shared folder")?;
        Ok(machine)
    }

    /// The folder that is `/lab` on the node.
    pub(super) fn shared(&self) -> PathBuf {
        self.run.path().join("lab")
    }

    /// Leaves the logs where they are; their folder.
    pub(super) fn keep(mut self) -> PathBuf {
        self.run.disable_cleanup(true);
        // As large as all that was written.
        let _ = fs::remove_file(self.run.path().join("changes"));
        self.run.path().to_owned()
    }

    /// Starts the node, hands out what it reports, and takes the power away once it has reported its end.
    pub(super) fn live(
        &self,
        life: Life,
        limit: Duration,
        mut heard: impl FnMut(Outcome),
    ) -> Result<()> {
        let report = self.shared().join(REPORT);
        fs::write(self.shared().join(LIFE), life.name()).context("telling the node its life")?;
        fs::write(&report, "").context("emptying the report")?;
        let begun = Instant::now();
        let mut running = self.start(life)?;
        let mut told = 0;
        loop {
            let ended = running.0.try_wait().context("asking after the node")?;
            let text = fs::read_to_string(&report).context("reading the report")?;
            let whole = text.rfind('\n').map_or("", |end| text.split_at(end).0);
            for line in whole.lines().skip(told) {
                told += 1;
                if line == END {
                    return Ok(());
                }
                match Outcome::read(line) {
                    Some(outcome) => heard(outcome),
                    None => bail!("the node ends: {line}"),
                }
            }
            if let Some(status) = ended {
                bail!("the node ended with {status} before its work was done");
            }
            if begun.elapsed() > limit {
                bail!("the node's work is not done after {limit:?}");
            }
            thread::sleep(STEP);
        }
    }

    fn start(&self, life: Life) -> Result<Running> {
        let console = self.run.path().join(format!("console-{}", life.name()));
        let console = File::create(console).context("making a file for the console")?;
        let mut boot = command("nice");
        // All that the kernel is made of dies with the first process of its own process namespace.
        boot.args(["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]);
        boot.arg(workspace().join("xtask/node-vm/boot.sh")).arg(&self.node).arg(self.run.path());
        boot.stdin(Stdio::null()).stderr(console.try_clone().context("sharing the console")?);
        boot.stdout(console);
        Ok(Running(boot.spawn().context("starting unshare (util-linux)")?))
    }
}

// === impl Running ===

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
