//! The node: a kernel in a process, which is started on one disk again and again, and killed.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::NODE_V4;

use super::stage::{LIMIT, wait};
use xtask::command::{command, workspace};

/// The cable's end on this side.
pub(super) const TAP: &str = "tap0";
/// Of `shell.socket`.
const SHELL: u16 = 5555;
/// The node's end. Without `gro` large transfers hang.
const CABLE: &str = "vec0:transport=tap,ifname=tap0,depth=128,gro=1,mac=02:00:00:00:00:01";
/// It would wait for udev's word on the cable, which is masked. The network is made by a unit of the test's.
const MASK: &str = "systemd.mask=systemd-networkd-wait-online.service";
/// What a script ends with, where it succeeds.
const DONE: &str = "\nit is done\n";

/// The node, which may be without power.
#[derive(Debug)]
pub(super) struct Machine {
    node: PathBuf,
    folder: PathBuf,
    running: Option<Child>,
    boots: u32,
}

// === impl Machine ===

impl Machine {
    /// One that was never started, of what `build.sh` made, with its files in `folder`.
    pub(super) fn new(node: &Path, folder: &Path) -> Self {
        Self { node: node.to_owned(), folder: folder.to_owned(), running: None, boots: 0 }
    }

    /// Starts it, and waits until its network is there.
    pub(super) fn power_on(&mut self) -> Result<()> {
        self.boots += 1;
        let console = self.folder.join(format!("console-{}", self.boots));
        let console = File::create(console).context("making a file for the console")?;
        let mut boot = command("unshare");
        // All that the kernel is made of dies with the first process of its own process namespace.
        boot.args(["--mount", "--pid", "--fork", "--kill-child"]);
        boot.arg(workspace().join("xtask/node-vm/boot.sh"));
        boot.arg(&self.node).arg(&self.folder).args([CABLE, MASK]).stdin(Stdio::null());
        boot.stderr(console.try_clone().context("sharing the console")?).stdout(console);
        self.running = Some(boot.spawn().context("starting unshare (util-linux)")?);
        wait("the node's shell", || self.shell("true").err().map(|error| format!("{error:#}")))
    }

    /// Takes the power away: nothing is written, nothing is said to anyone.
    pub(super) fn power_off(&mut self) -> Result<()> {
        let mut running = self.running.take().context("the node has no power")?;
        running.kill().and_then(|()| running.wait()).context("ending the node")?;
        Ok(())
    }

    /// What a shell on the node, as root, says to a script.
    pub(super) fn shell(&self, script: &str) -> Result<String> {
        let address = SocketAddr::from((NODE_V4, SHELL));
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5));
        let mut stream = stream.context("reaching the node's shell")?;
        stream.set_read_timeout(Some(LIMIT)).context("setting a timeout")?;
        let script = format!("exec 2>&1\nset -e\n{script}\necho '{DONE}'\n");
        stream.write_all(script.as_bytes()).context("writing to the node's shell")?;
        stream.shutdown(Shutdown::Write).context("ending a script")?;
        let mut said = String::new();
        stream.read_to_string(&mut said).context("reading from the node's shell")?;
        let done = said.strip_suffix('\n').and_then(|said| said.strip_suffix(DONE));
        ensure!(done.is_some(), "the node says {:?} to {script:?}", said.trim());
        Ok(done.unwrap_or_default().to_owned())
    }
}

/// Puts the files of `xtask/cluster/node` where the node finds them.
pub(super) fn share_files(shared: &Path) -> Result<()> {
    let from = workspace().join("xtask/cluster/node");
    let to = shared.join("node");
    fs::create_dir_all(to.join("images")).context("making the shared folder")?;
    for entry in fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry.context("reading a folder")?;
        fs::copy(entry.path(), to.join(entry.file_name())).context("sharing a file")?;
    }
    // Where the node's own service starts the lab.
    fs::copy(from.join("lab"), shared.join("lab")).map(drop).context("sharing a file")
}
