//! The daemon: its configuration, its start, its end.

use std::{
    ffi::OsStr,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use xtask::command::printed;

use super::{
    cri::Cri,
    image::{self, BUSYBOX},
    kubelet::Kubelet,
    messages::{Nothing, StatusResponse},
    shape::CgroupDriver,
};
use crate::{
    cgroup::{Cgroup, join},
    node::Node,
    process::Process,
};

/// Where its programs are looked for: those of root, whatever the user's `PATH` is.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where distributions put CNI plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// The pods' addresses. Those of the lab's own pods are below.
const PODS: &str = "10.77.128.0/17";
/// How long it may take to be ready; it takes a second.
const READY: Duration = Duration::from_secs(30);
/// What it runs as, with its configuration and its cgroup as arguments: the node's cgroup is the root of the cgroup
/// namespace, and of the mount.
const START: &str = "
set -e
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
echo 0 > \"/sys/fs/cgroup/$2/cgroup.procs\"
exec containerd --config \"$1\"
";
/// What a script with runc's arguments does to the configuration of the container that is to be created, before it
/// becomes runc. What it said would be in the container's log.
const ADAPT: &str = r#"
bundle=
for word; do
    [ "$bundle" != next ] || bundle=$word
    [ "$word" != --bundle ] || bundle=next
done
if [ -n "$bundle" ]; then
    # What is not there, as v1 has it, can't be set; containerd sets it for every sandbox.
    grep -qw cpu /sys/fs/cgroup/cgroup.controllers || sed -i 's/"cpu":{[^}]*}/"cpu":{}/' "$bundle/config.json"
    # To load the filter of devices crun raises this limit, which not every root may; runc does not.
    case $0 in
        */crun) ulimit -l unlimited 2>&- || sed -i 's/"devices":\[[^]]*\]/"devices":[]/' "$bundle/config.json" ;;
    esac
fi
"#;
/// Its cgroup, and that of all its shims, relative to the node's.
const SERVICE: &str = "system.slice/containerd.service";

/// The program that makes containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// The one that Kubernetes is run with almost everywhere.
    Runc,
    /// In C, and in another order.
    Crun,
}

/// A running containerd. Drop kills it, its shims and, with its mount namespace, what they mounted.
#[derive(Debug)]
pub struct Containerd {
    process: Process,
    /// Its cgroup and its shims'.
    service: Cgroup,
    folder: PathBuf,
    node: Node,
}

// === impl Handler ===

impl Handler {
    const ALL: [Self; 2] = [Self::Runc, Self::Crun];

    /// Its name, in the configuration and as a program.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }

    pub(super) fn program(self) -> Result<PathBuf> {
        let name = self.name();
        program(name).with_context(|| format!("{name} is not installed"))
    }
}

// === impl Containerd ===

impl Containerd {
    /// Whether its programs are installed.
    pub fn available() -> Result<(), String> {
        let programs = ["containerd", "runc", "crun"];
        let mut missing: Vec<&str> =
            programs.into_iter().filter(|name| program(name).is_none()).collect();
        if plugins().is_none() {
            missing.push("CNI plugins");
        }
        if !Path::new(BUSYBOX).exists() {
            missing.push("busybox-static");
        }
        match missing.as_slice() {
            [] => Ok(()),
            missing => Err(format!(
                "not installed: {}; on Debian `cargo xtask test runtime` installs them",
                missing.join(", ")
            )),
        }
    }

    /// Starts it on `node`, and gives it the image that all containers are of.
    pub fn start(node: &Node) -> Result<Self> {
        let folder = node.folder().join("containerd");
        let network = folder.join("cni");
        fs::create_dir_all(&network).with_context(|| format!("making {}", network.display()))?;
        fs::write(network.join("10-lab.conflist"), network_config()).context("writing for CNI")?;
        let config = folder.join("config.toml");
        fs::write(&config, configuration(&folder)?)
            .context("writing containerd's configuration")?;
        let service = Cgroup::create(node.root_cgroup().join(SERVICE))?;
        let mut command = node.netns().command("unshare");
        join(node.root_cgroup(), &mut command)?;
        command
            .args(["--mount", "--cgroup", "--propagation", "private", "sh", "-c", START, "sh"])
            .arg(&config)
            .arg(SERVICE)
            .env_clear()
            .env("PATH", PATH);
        let process = Process::start("containerd", &mut command, folder.join("containerd.log"))?;
        let mut containerd = Self { process, service, folder, node: node.clone() };
        let (socket, mut lacks) = (containerd.socket(), None);
        let ready = containerd.process.wait("become ready", READY, |_| {
            lacks = unready(&socket);
            lacks.is_none()
        });
        ready.with_context(|| format!("it waits for {lacks:?}"))?;
        import(&containerd.socket(), &containerd.folder)?;
        Ok(containerd)
    }

    /// A kubelet's connection to it, for one thread.
    pub fn kubelet(&self) -> Result<Kubelet> {
        let logs = self.folder.join("pods");
        Kubelet::connect(&self.socket(), &self.node, logs, CgroupDriver::Cgroupfs)
    }

    /// `ctr` with these arguments, in the Kubernetes containers' namespace.
    ///
    /// # Errors
    ///
    /// When the daemon's cgroup is gone.
    pub fn ctr<const N: usize>(&self, arguments: [&str; N]) -> Result<Command> {
        let mut ctr = self.command("ctr")?;
        ctr.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]).args(arguments);
        Ok(ctr)
    }

    /// The program that makes containers of whatever this machine lacks.
    #[must_use]
    pub fn runc(&self) -> PathBuf {
        self.folder.join(Handler::Runc.name())
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A command where containerd runs: in its namespaces and its cgroup.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = self.node.netns().command("nsenter");
        self.service.adopt(&mut command)?;
        let target = format!("--target={}", self.process.pid());
        command.arg(target).args(["--mount", "--cgroup", "--"]).arg(program);
        command.env_clear().env("PATH", PATH).stdin(Stdio::null());
        Ok(command)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // It may not have come as far as its cgroup, and is killed by itself, too.
        if let Err(error) = self.service.kill() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// What the runtime at `socket`, or its network, waits for; `None` where it is ready.
#[must_use]
pub fn unready(socket: &Path) -> Option<String> {
    let unmet = match conditions(socket) {
        Ok(unmet) => unmet,
        Err(error) => vec![format!("{error:#}")],
    };
    (!unmet.is_empty()).then(|| unmet.join(", "))
}

fn conditions(socket: &Path) -> Result<Vec<String>> {
    let answer: StatusResponse = Cri::connect(socket)?.call("Status", &Nothing {})?;
    let conditions = answer.status.context("a status without a status")?.conditions;
    let unmet = conditions.into_iter().filter(|condition| !condition.status);
    Ok(unmet.map(|condition| format!("{}: {}", condition.r#type, condition.message)).collect())
}

/// Gives the runtime at `socket` the image that all containers are of, made in `folder`.
pub fn import(socket: &Path, folder: &Path) -> Result<()> {
    let archive = folder.join("image.tar");
    image::write(&archive)?;
    let mut import = Command::new("ctr");
    import.env("PATH", PATH).arg("--address").arg(socket);
    import.args(["--namespace", "k8s.io", "images", "import"]).arg(&archive);
    printed(&mut import).map(drop)
}

fn program(name: &str) -> Option<PathBuf> {
    PATH.split(':').map(|folder| Path::new(folder).join(name)).find(|path| path.is_file())
}

fn plugins() -> Option<&'static str> {
    PLUGINS.into_iter().find(|folder| Path::new(folder).join("ptp").is_file())
}

/// A veth for each pod and a route to it, as Calico and the VPC CNI do: a configuration of CNI.
#[must_use]
pub fn network_config() -> String {
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "dataDir": "/run/cni",
                "ranges": [[{ "subnet": PODS }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    })
    .to_string()
}

/// Writes the script that adapts containers to what this machine lacks, where it does, and goes on as `program`.
fn adapted(program: &Path, folder: &Path) -> Result<PathBuf> {
    let script = folder.join(program.file_name().context("a program has a name")?);
    let text = format!("#!{BUSYBOX} sh\n{ADAPT}exec {} \"$@\"\n", program.display());
    fs::write(&script, text).with_context(|| format!("writing {}", script.display()))?;
    fs::set_permissions(&script, Permissions::from_mode(0o755)).context("making it executable")?;
    Ok(script)
}

fn configuration(folder: &Path) -> Result<String> {
    let plugins = plugins().context("no CNI plugins are installed")?;
    let mut text = format!(
        r#"version = 2
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{network}"
"#,
        socket = folder.join("socket").display(),
        image = image::NAME,
        network = folder.join("cni").display(),
    );
    for handler in Handler::ALL {
        let name = handler.name();
        let program = handler.program()?;
        text += &format!(
            r#"[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}.options]
BinaryName = "{program}"
SystemdCgroup = false
"#,
            program = adapted(&program, folder)?.display(),
        );
    }
    Ok(text)
}
