//! Containers by runc or crun alone, in pods that have no process before their first container: CRI-O makes no process to
//! hold a sandbox where the pod's containers share no processes.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::time::Instant;

use super::{
    containerd::{Containerd, Handler},
    image,
    kubelet::Exited,
};
use crate::{LabPod, Layout};

/// How long a container may run until it has ended.
const END: Duration = Duration::from_secs(30);
/// Creates a container and starts it, with the program, the bundle and its name as arguments. A runtime's client can't
/// do that faster.
const RUN: &str = r#""$1" create --bundle "$2" "$3" && exec "$1" start "$3""#;

impl Containerd {
    /// Creates a container in `pod`, starts `command` as its first process at once, and waits for its end. The pod is to
    /// be of [`Layout::CgroupfsBurstable`].
    pub fn run_without_sandbox(
        &self,
        pod: &LabPod,
        handler: Handler,
        command: &[&str],
    ) -> Result<Exited> {
        let id = format!("{}-{}", handler.name(), pod.uid());
        let cgroup = Layout::CgroupfsBurstable.container(pod.uid(), &id);
        let cgroup = self.node().kubepods().join(cgroup);
        let bundle = self.folder().join("bundles").join(&id);
        fs::create_dir_all(&bundle).with_context(|| format!("making {}", bundle.display()))?;
        image::busybox(Path::new(image::BUSYBOX))?.unpack(&bundle.join("root"))?;
        let seen = cgroup.strip_prefix(self.node().root_cgroup());
        let seen = Path::new("/").join(seen.context("the pods' cgroup is below the node's")?);
        let config = json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": command, "env": [], "cwd": "/" },
            "root": { "path": "root", "readonly": true },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": {
                "namespaces": [
                    { "type": "pid" },
                    { "type": "ipc" },
                    { "type": "mount" },
                    { "type": "network", "path": pod.netns().path() },
                ],
                "cgroupsPath": seen,
            },
        });
        fs::write(bundle.join("config.json"), config.to_string()).context("writing a bundle")?;
        let (log, program) = (bundle.join("log"), handler.program()?);
        let output = File::create(&log).context("making a container's log")?;
        let mut run = self.command("sh")?;
        run.args(["-c", RUN, "sh"]).arg(&program).arg(&bundle).arg(&id);
        run.stdout(output.try_clone().context("sharing a container's log")?).stderr(output);
        let said = || fs::read_to_string(&log).unwrap_or_default();
        succeeded(&mut run).with_context(said)?;
        wait_empty(&cgroup).with_context(said)?;
        let mut delete = self.command(&program)?;
        succeeded(delete.args(["delete", "--force", &id]))?;
        Ok(Exited { code: 0, output: said(), first_line: None })
    }
}

fn succeeded(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// Waits until no process is in the container's cgroup.
fn wait_empty(cgroup: &Path) -> Result<()> {
    let begun = Instant::now();
    while fs::read_to_string(cgroup.join("cgroup.events"))
        .is_ok_and(|events| events.contains("populated 1"))
    {
        if begun.elapsed() > END {
            bail!("a container runs on after {END:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
