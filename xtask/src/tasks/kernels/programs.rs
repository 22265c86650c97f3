//! What guests run, compiled: this command, the agent, and its tests.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{architecture::Architecture, debian::Debian, initramfs::Userland};
use xtask::{
    command::{command, output_of},
    toolchain::{self, DEBIAN_RUSTC, Route},
};

/// Programs that tests and pods use; those that are missing where they come from are missing in the guest.
const TOOLS: [&str; 26] = [
    "sh", "bash", "cat", "cp", "env", "find", "ip", "ipvsadm", "kill", "ls", "mkdir", "mount",
    "mv", "nft", "nice", "nsenter", "prlimit", "rm", "rmdir", "seq", "setpriv", "sleep", "tc",
    "touch", "true", "unshare",
];
/// In this order: Debian's `/sbin/ip` is a link to `/bin/ip` of whatever machine it is on.
const FOLDERS: [&str; 4] = ["usr/bin", "bin", "usr/sbin", "sbin"];
/// Whom the agent trusts, which it needs to start though nobody of the lab's uses TLS.
const TRUST: &str = "/etc/ssl/certs/ca-certificates.crt";
/// What a guest of the other architecture needs of Debian, and what compiles for it.
const ARM64_PACKAGES: [&str; 8] =
    ["coreutils", "dash", "findutils", "iproute2", "libc6", "libgcc-s1", "nftables", "util-linux"];
const ARM64_STD: &str = "libstd-rust-web-dev";
const CROSS: [&str; 2] = ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"];
const CROSS_COMPILER: &str = "aarch64-linux-gnu-gcc";

/// Programs by their cargo target's name.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) paths: BTreeMap<String, PathBuf>,
    pub(super) userland: Userland,
}

// === impl Programs ===

impl Programs {
    /// Those of this machine's architecture, by that profile of cargo's.
    pub(super) fn here(tests: &[&str], profile: &str) -> Result<Self> {
        if tests.contains(&"guard") && !Path::new("/sbin/ipvsadm").exists() {
            toolchain::install_packages(&["ipvsadm"])?;
        }
        let paths = compiled(tests, |cargo| {
            cargo.args(["--profile", profile]);
        })?;
        let mut userland = Userland::new(Architecture::Amd64, PathBuf::from("/"));
        userland.add_tools();
        userland.files.extend(trust());
        Ok(Self { paths, userland })
    }

    /// Those of guests whose processors are of the other architecture, by Debian's compilers and libraries alone.
    pub(super) fn arm64(debian: &Debian, folder: &Path, tests: &[&str]) -> Result<Self> {
        let root = folder.join("arm64");
        compiler_for_arm64(debian, &root)?;
        let mark = root.join("unpacked");
        let wanted = ARM64_PACKAGES.join(" ");
        if fs::read_to_string(&mark).unwrap_or_default() != wanted {
            debian.unpack_all(Architecture::Arm64, &ARM64_PACKAGES, &root)?;
            fs::write(mark, wanted).context("recording the unpacked packages")?;
        }
        let paths = compiled(tests, |cargo| cross(cargo, &root, ""))?;
        let mut userland = Userland::new(Architecture::Arm64, root);
        userland.add_tools();
        userland.files.extend(trust());
        Ok(Self { paths, userland })
    }
}

/// Makes Debian's compilers able to compile for arm64, with Rust's standard library of that architecture in `root`.
///
/// # Errors
///
/// When this machine compiles with rustup's nightly, or Debian's packages are not to be had.
pub(crate) fn compiler_for_arm64(debian: &Debian, root: &Path) -> Result<()> {
    fs::create_dir_all(root).context("making a folder for another architecture's files")?;
    let toolchain = toolchain::ensure()?;
    ensure!(
        toolchain.route == Route::Debian,
        "programs for arm64 are compiled by Debian's rustc-web, and this machine has rustup's nightly: \
         apt-get install rustc-web"
    );
    if output_of(command(CROSS_COMPILER).arg("--version")).is_none() {
        toolchain::install_packages(&CROSS)?;
    }
    // Only the same version's libraries can be linked.
    let version = output_of(command("dpkg-query").args(["-W", "-f", "${Version}", "rustc-web"]));
    let version = version.context("rustc-web is not installed as a package")?;
    let mark = root.join("std");
    if fs::read_to_string(&mark).unwrap_or_default() != version {
        let std = format!("{ARM64_STD}:{}={version}", Architecture::Arm64);
        debian.unpack_one(&std, root)?;
        fs::write(mark, version).context("recording the unpacked version")?;
    }
    Ok(())
}

/// Sets `cargo` to compile for arm64 with what [`compiler_for_arm64`] put into `root`.
pub(crate) fn cross(cargo: &mut Command, root: &Path, flags: &str) {
    let sysroot = root.join("usr");
    cargo.args(["--target", Architecture::Arm64.triple()]);
    cargo.args(["--target-dir", "target/arm64"]).env("RUSTC", DEBIAN_RUSTC);
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", CROSS_COMPILER);
    let flags = format!("--sysroot={} {flags}", sysroot.display());
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags);
}

/// Compiles the programs of the workspace and the agent's tests, as `with` changes the commands.
fn compiled(tests: &[&str], with: impl Fn(&mut Command)) -> Result<BTreeMap<String, PathBuf>> {
    let mut paths = BTreeMap::new();
    let mut programs = command("cargo");
    programs.args(["build", "--bins"]);
    let mut with_tests = command("cargo");
    // Of all members, whose features are those of every other build then.
    with_tests.args(["test", "--no-run"]);
    with_tests.args(tests.iter().flat_map(|test| ["--test", test]));
    // Without a name it would compile all of them, some of which are named like programs.
    let with_tests = (!tests.is_empty()).then_some(with_tests);
    for mut cargo in std::iter::once(programs).chain(with_tests) {
        with(&mut cargo);
        let cargo = cargo.args(["--message-format", "json-render-diagnostics"]);
        let messages = output_of(cargo.stderr(Stdio::inherit())).context("it does not compile")?;
        paths.extend(messages.lines().filter_map(executable));
    }
    Ok(paths)
}

/// The name and the path of a program that cargo's message tells of.
fn executable(message: &str) -> Option<(String, PathBuf)> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let name = message["target"]["name"].as_str()?;
    Some((name.to_owned(), PathBuf::from(message["executable"].as_str()?)))
}

fn trust() -> Option<(PathBuf, PathBuf)> {
    let path = PathBuf::from(TRUST);
    path.exists().then(|| (path.clone(), path))
}

// === impl Userland ===

impl Userland {
    fn new(architecture: Architecture, root: PathBuf) -> Self {
        Self { architecture, root, programs: Vec::new(), files: Vec::new() }
    }

    fn add_tools(&mut self) {
        for name in TOOLS {
            let paths = FOLDERS.map(|folder| self.root.join(folder).join(name));
            let found = paths.into_iter().find(|path| path.exists());
            self.programs.extend(found.map(|path| (path, Path::new("/bin").join(name))));
        }
    }
}
