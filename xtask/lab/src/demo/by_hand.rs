//! `--keep`: the node stays up, and small scripts put a command of one's own inside a pod.

use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use super::script::{CREDENTIALS, Script};
use crate::LabPod;

const POLL: Duration = Duration::from_millis(50);

/// Says what can be tried and waits for Enter or Ctrl-C.
pub(super) fn wait(script: &Script, interrupted: &Arc<AtomicBool>) -> Result<()> {
    println!("\nThe node stays up until Enter or Ctrl-C. From another terminal, as root:\n");
    println!("   cd {}", script.folder().display());
    for pod in script.pods() {
        let inside = write_script(script.folder(), pod)?;
        println!("   ./{inside} curl -s 169.254.169.254{CREDENTIALS}");
    }
    println!(
        "   kill -9 {}      # the agent: pods are refused, not passed to the node's",
        script.agent_pid()
    );
    if let Some(log) = script.agent_log() {
        println!("   tail {}", log.display());
    }
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
fn write_script(folder: &Path, pod: &LabPod) -> Result<String> {
    let name = format!("in-{}", pod.spec().name);
    let path = folder.join(&name);
    let text = format!(
        "#!/bin/sh\necho $$ > {}/cgroup.procs && exec nsenter --net={} -- \"$@\"\n",
        pod.cgroup().path().display(),
        pod.netns().path()
    );
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&path, mode).with_context(|| format!("marking {}", path.display()))?;
    Ok(name)
}
