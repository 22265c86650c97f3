//! `--keep`: the node stays up, and small scripts put a command of one's own inside a pod.

use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use super::script::Script;
use crate::lab::LabPod;

const POLL: Duration = Duration::from_millis(50);

/// Says what can be tried and waits for Enter or Ctrl-C.
pub(super) fn wait(script: &Script, interrupted: &Arc<AtomicBool>) -> Result<()> {
    println!("\nThe node stays up until Enter or Ctrl-C. From another terminal, as root:\n");
    for pod in script.pods() {
        let inside = write_script(script.folder(), pod)?;
        println!("   {} curl -s 169.254.169.254{}", inside.display(), super::script::CREDENTIALS);
    }
    println!(
        "   kill -9 {}      # the agent: pods are refused, not passed to the node's",
        script.agent_pid()
    );
    println!("\n   The agent's log: {}/agent.log", script.folder().display());
    let entered = Arc::clone(interrupted);
    // A read that nobody answers must not keep the process: this thread is not waited for.
    thread::spawn(move || {
        let read = std::io::stdin().read(&mut [0]);
        // Without a terminal there is no Enter, only Ctrl-C.
        if matches!(read, Ok(1..)) {
            entered.store(true, Ordering::Relaxed);
        }
    });
    while !interrupted.load(Ordering::Relaxed) {
        thread::sleep(POLL);
    }
    Ok(())
}

/// A script that joins the pod's cgroup and network namespace and becomes its arguments.
fn write_script(folder: &Path, pod: &LabPod) -> Result<PathBuf> {
    let path = folder.join(format!("in-{}", pod.spec().name));
    let text = format!(
        "#!/bin/sh\necho $$ > {}/cgroup.procs && exec nsenter --net={} -- \"$@\"\n",
        pod.cgroup().path().display(),
        pod.netns().path()
    );
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&path, mode).with_context(|| format!("marking {}", path.display()))?;
    Ok(path)
}
