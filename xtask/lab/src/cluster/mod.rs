//! `cargo xtask test cluster`: the agent in a Kubernetes cluster of one node, as `deploy/` installs it.
//!
//! The control plane runs on this machine, in a network namespace of its own with the stand-ins for STS and the metadata
//! service; the node is user-mode Linux on the other end of a cable. All processes are of one process namespace, and go with
//! its first one.

mod control_plane;
mod image;
mod kubectl;
mod laptop;
mod life;
mod machine;
mod pods;
mod report;
mod rows;
mod stage;

use std::{
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use tokio::time::Instant;

use self::stage::Stage;
use crate::node_vm::{Outcome, shown};
use xtask::command::{command, say, workspace};

/// All of it: on a busy machine more than an hour.
const LIMIT: Duration = Duration::from_secs(7200);
/// If set: parts of rows' names, separated by commas; only these rows are played, and those that all build on.
const ROWS: &str = "KIAM_CLUSTER_ROWS";

/// What a run is made of.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Parts {
    /// What `xtask/apiserver/build.sh` made.
    programs: PathBuf,
    /// What `xtask/node-vm/build.sh` made.
    node: PathBuf,
}

/// Runs the rows in namespaces of their own.
pub(crate) fn run(parts: &Parts) -> Result<()> {
    let below = workspace().join("target/tmp");
    fs::create_dir_all(&below).with_context(|| format!("making {}", below.display()))?;
    let mut folder = TempDir::with_prefix_in("cluster-", below).context("making a folder")?;
    let mut inside = command("unshare");
    inside.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    inside.arg(env::current_exe().context("finding this program")?).arg("in-cluster");
    inside.arg(&parts.programs).arg(&parts.node).arg(folder.path());
    let mut inside = inside.spawn().context("starting unshare (util-linux)")?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = inside.try_wait().context("asking after the cluster")? {
            break Some(status);
        }
        if begun.elapsed() > LIMIT {
            inside.kill().and_then(|()| inside.wait()).context("ending the cluster")?;
            break None;
        }
        thread::sleep(Duration::from_millis(200));
    };
    if status.is_some_and(|status| status.success()) {
        return Ok(());
    }
    folder.disable_cleanup(true);
    // As large as all that the node wrote.
    let _ = fs::remove_file(folder.path().join("changes"));
    say(format!("the cluster's logs are kept in {}", folder.path().display()));
    match status {
        Some(_) => bail!("rows failed"),
        None => bail!("the rows are not done after {LIMIT:?}"),
    }
}

/// Runs the rows; the namespaces are there.
pub(crate) fn inside(parts: &Parts, folder: &Path) -> Result<()> {
    let chosen = env::var(ROWS).unwrap_or_default();
    let mut stage = Stage::set(parts, folder)?;
    let mut outcomes = Vec::new();
    for (number, (name, row)) in rows::ALL.iter().enumerate() {
        let needed = number < rows::NEEDED || chosen.split(',').any(|part| name.contains(part));
        if !needed {
            continue;
        }
        let begun = Instant::now();
        let result = row(&mut stage);
        let (seconds, passed) = (begun.elapsed().as_secs(), result.is_ok());
        let said = result.unwrap_or_else(|error| format!("{error:#}"));
        let outcome = Outcome { name: (*name).to_owned(), passed, seconds, said };
        say(shown(&outcome));
        outcomes.push(outcome);
        let table = report::table(&stage.versions, &outcomes);
        fs::write(folder.join("table.md"), table).context("writing the table so far")?;
        if !passed && number < rows::NEEDED {
            break;
        }
    }
    eprintln!();
    outcomes.iter().for_each(|outcome| eprintln!("{}", shown(outcome)));
    ensure!(outcomes.iter().all(|outcome| outcome.passed), "rows failed");
    if chosen.is_empty() {
        report::write(&stage.versions, &outcomes)?;
    }
    Ok(())
}
