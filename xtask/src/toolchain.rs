//! Finds out how this machine can compile for BPF, and what it lacks for that. Looking and deciding are apart: `plan`
//! is a pure function of a [`Machine`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{command, output_of, run, say, workspace};

/// The linker's version is pinned: its output is what the kernel's verifier judges.
pub const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";
/// The compiler of Debian that has `core` for BPF.
pub const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const CONTAINER_RUNTIME: [&str; 5] =
    ["containerd", "runc", "crun", "containernetworking-plugins", "busybox-static"];
const TARGET: &str = "bpfel-unknown-none";

/// A way to compile for BPF. Stable toolchains of rustup have no `core` for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Debian's `rustc-web` with the prebuilt `core` of `libstd-rust-web-dev-bpf`.
    Debian,
    /// rustup's nightly, which compiles `core` from `rust-src`.
    Nightly,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Debian => "Debian's rustc-web with its prebuilt core for BPF",
            Self::Nightly => "rustup's nightly with -Z build-std=core",
        })
    }
}

/// What of all this a machine has.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// `/usr/bin/rustc` has `core` for BPF.
    debian_core: bool,
    /// LLVM 22 with its headers, which Debian's rustc is built with.
    debian_llvm: bool,
    /// rustup's nightly has `rust-src`.
    nightly_source: bool,
    /// `bpf-linker` of the pinned version.
    linker: Option<PathBuf>,
    /// Packages can be installed: Debian's apt is there, and we are root.
    apt: Apt,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Apt {
    #[default]
    Absent,
    NeedsRoot,
    Usable,
}

/// What to do before the kernel program can be compiled, and how it is compiled then.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    route: Route,
    packages: Vec<&'static str>,
    linker: Option<PathBuf>,
}

/// A toolchain that is there.
#[derive(Debug)]
pub struct Toolchain {
    /// How to compile.
    pub route: Route,
    /// The linker to use.
    pub linker: PathBuf,
}

fn plan(machine: &Machine) -> Result<Plan, String> {
    let linker = machine.linker.clone();
    if machine.nightly_source && !machine.debian_core && linker.is_some() {
        return Ok(Plan { route: Route::Nightly, packages: Vec::new(), linker });
    }
    let mut packages = Vec::new();
    if !machine.debian_core {
        packages.extend(["rustc-web", "libstd-rust-web-dev-bpf"]);
    }
    if linker.is_none() && !machine.debian_llvm {
        packages.push("llvm-22-dev");
    }
    if packages.is_empty() || machine.apt == Apt::Usable {
        return Ok(Plan { route: Route::Debian, packages, linker });
    }
    Err(advice(machine, &packages))
}

fn advice(machine: &Machine, packages: &[&str]) -> String {
    let debian =
        format!("apt-get update && apt-get install --no-install-recommends {}", packages.join(" "));
    let nightly = nightly_lines();
    match machine.apt {
        Apt::Absent => format!("no toolchain for BPF is here; install one with:\n  {nightly}"),
        _ => format!(
            "no toolchain for BPF is here; as root, this command installs it, or do it yourself:\n  {debian}\n\
             or, with rustup:\n  {nightly}"
        ),
    }
}

fn nightly_lines() -> String {
    format!(
        "rustup toolchain install nightly --component rust-src && cargo install bpf-linker --version {LINKER_VERSION}"
    )
}

/// Looks for a toolchain and, where that is possible, installs what is missing, saying so.
pub fn ensure() -> Result<Toolchain> {
    let plan = plan(&look()).map_err(anyhow::Error::msg)?;
    if !plan.packages.is_empty() {
        say(format!("installing Debian packages: {}", plan.packages.join(" ")));
        install_packages(&plan.packages).with_context(|| {
            format!(
                "this Debian may be too old or too new for them; with rustup it is:\n  {}",
                nightly_lines()
            )
        })?;
    }
    let linker = match plan.linker {
        Some(linker) => linker,
        None => install_linker()?,
    };
    Ok(Toolchain { route: plan.route, linker })
}

/// Installs `ip`, which the lab needs, where it is missing and can be installed; without it the lab says so.
pub fn ensure_iproute() -> Result<()> {
    if output_of(command("ip").arg("-V")).is_some() || look_for_apt() != Apt::Usable {
        return Ok(());
    }
    say("installing Debian packages: iproute2");
    install_packages(&["iproute2"])
}

/// Installs `nft` and `iptables`, with which the tests of the guard and of preflight do what kube-proxy and kiam do, where they
/// are missing and can be installed; without them they say so.
pub fn ensure_packet_filters() {
    let lacks = |program: &str| output_of(command(program).arg("--version")).is_none();
    let packages = [("nft", "nftables"), ("iptables", "iptables")];
    let missing: Vec<_> = packages.iter().filter(|(program, _)| lacks(program)).collect();
    if missing.is_empty() || look_for_apt() != Apt::Usable {
        return;
    }
    let missing: Vec<_> = missing.into_iter().map(|(_, package)| *package).collect();
    say(format!("installing Debian packages: {}", missing.join(" ")));
    if let Err(error) = install_packages(&missing) {
        say(format!("they can't be installed: {error:#}"));
    }
}

/// Installs a container runtime and what the lab runs it with, where it is missing and can be installed; without it the
/// tests that need one say so.
pub fn ensure_container_runtime() {
    let installed = || output_of(command("dpkg-query").arg("--show").args(CONTAINER_RUNTIME));
    if look_for_apt() != Apt::Usable || installed().is_some() {
        return;
    }
    if Path::new("/run/systemd/system").exists() {
        say("no container runtime is installed: Debian's package would start a service here");
        return;
    }
    say(format!("installing Debian packages: {}", CONTAINER_RUNTIME.join(" ")));
    if let Err(error) = install_packages(&CONTAINER_RUNTIME) {
        say(format!("no container runtime to be had: {error:#}"));
    }
}

/// Installs Debian packages; the caller says which and why.
pub fn install_packages(packages: &[&str]) -> Result<()> {
    let mut install = command("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    install.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    if run(&mut install).is_ok() {
        return Ok(());
    }
    say("the package lists may be old or absent: updating them and trying once more");
    run(command("apt-get").arg("update"))?;
    run(&mut install)
}

/// A program of crates.io, of this version and with these features, installed unless it is there.
pub fn ensure_program(name: &str, version: &str, features: &str) -> Result<PathBuf> {
    let program = tools().join("bin").join(name);
    if is_of_version(&program, version) {
        return Ok(program);
    }
    install_program(&mut command("cargo"), name, version, features)
}

/// Installs npm, by which the packages of its registry come, where it is missing.
pub fn ensure_npm() -> Result<()> {
    if output_of(command("npm").arg("--version")).is_some() {
        return Ok(());
    }
    say("installing Debian packages: npm");
    install_packages(&["npm"])
}

fn install_linker() -> Result<PathBuf> {
    let mut cargo = command("cargo");
    cargo.env("LLVM_PREFIX", LLVM).env("LLVM_SYS_221_PREFIX", LLVM);
    install_program(&mut cargo, "bpf-linker", LINKER_VERSION, "llvm-22")
}

fn install_program(
    cargo: &mut Command,
    name: &str,
    version: &str,
    features: &str,
) -> Result<PathBuf> {
    let root = tools();
    say(format!("installing {name} {version} into {} (minutes, once)", root.display()));
    cargo.args(["install", name, "--version", version, "--no-default-features"]);
    run(cargo.args(["--features", features, "--locked", "--force", "--root"]).arg(&root))?;
    let program = root.join("bin").join(name);
    if !is_of_version(&program, version) {
        bail!("{} was installed, and is not {name} {version}", program.display());
    }
    Ok(program)
}

/// Where programs of crates.io are installed: tools of this build, nothing of the machine is changed.
fn tools() -> PathBuf {
    workspace().join("target/tools")
}

// === looking ===

fn look() -> Machine {
    let linkers = [tools().join("bin/bpf-linker"), PathBuf::from("bpf-linker")];
    Machine {
        debian_core: has_core(Path::new(DEBIAN_RUSTC)),
        debian_llvm: Path::new(LLVM).join("bin/llvm-config").exists()
            && Path::new(LLVM).join("include/llvm-c").exists(),
        nightly_source: has_nightly_source(),
        linker: linkers.into_iter().find(|linker| is_of_version(linker, LINKER_VERSION)),
        apt: look_for_apt(),
    }
}

/// Whether a compiler has a prebuilt `core` for BPF.
fn has_core(rustc: &Path) -> bool {
    let folder = output_of(command(rustc).args(["--print", "target-libdir", "--target", TARGET]));
    let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok());
    entries.into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with("libcore-")
    })
}

fn has_nightly_source() -> bool {
    // `rustup run` does not install what is missing, as `rustc +nightly` does.
    let sysroot =
        output_of(command("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    sysroot.is_some_and(|sysroot| {
        Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
    })
}

/// Whether a program says that it is of this version, with or without a `v` before it.
fn is_of_version(program: &Path, version: &str) -> bool {
    output_of(command(program).arg("--version")).is_some_and(|said| {
        said.split_whitespace().nth(1).is_some_and(|word| word.trim_start_matches('v') == version)
    })
}

fn look_for_apt() -> Apt {
    match Path::new("/usr/bin/apt-get").exists() {
        false => Apt::Absent,
        true if rustix::process::geteuid().is_root() => Apt::Usable,
        true => Apt::NeedsRoot,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linker() -> Option<PathBuf> {
        Some(PathBuf::from("bpf-linker"))
    }

    #[test]
    fn plan_takes_what_is_there_and_installs_only_what_is_missing() {
        let bare = Machine { apt: Apt::Usable, ..Machine::default() };
        let debian =
            Machine { debian_core: true, debian_llvm: true, linker: linker(), ..bare.clone() };
        let nightly = Machine { nightly_source: true, linker: linker(), ..bare.clone() };
        let all = ["rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev"];
        let cases = [
            ("bare Debian, root", bare.clone(), Route::Debian, &all[..], None),
            ("everything of Debian", debian.clone(), Route::Debian, &all[..0], linker()),
            (
                "no linker",
                Machine { linker: None, ..debian.clone() },
                Route::Debian,
                &all[..0],
                None,
            ),
            (
                "linker, no LLVM",
                Machine { debian_llvm: false, ..debian.clone() },
                Route::Debian,
                &[],
                linker(),
            ),
            (
                "both",
                Machine { nightly_source: true, ..debian },
                Route::Debian,
                &all[..0],
                linker(),
            ),
            ("nightly", nightly.clone(), Route::Nightly, &all[..0], linker()),
            (
                "nightly without linker",
                Machine { linker: None, ..nightly },
                Route::Debian,
                &all,
                None,
            ),
        ];
        for (name, machine, route, packages, linker) in cases {
            let wanted = Plan { route, packages: packages.to_vec(), linker };
            assert_eq!(plan(&machine), Ok(wanted), "{name}");
        }
    }

    #[test]
    fn user_without_root_is_told_the_exact_lines() {
        let user = Machine { apt: Apt::NeedsRoot, debian_core: true, ..Machine::default() };
        let advice = plan(&user).unwrap_err();
        assert!(
            advice.contains("apt-get install --no-install-recommends llvm-22-dev\n"),
            "{advice}"
        );
        assert!(
            advice.contains("rustup toolchain install nightly --component rust-src"),
            "{advice}"
        );
    }

    #[test]
    fn machine_without_apt_is_not_told_about_apt() {
        let advice = plan(&Machine::default()).unwrap_err();
        assert!(!advice.contains("apt"), "{advice}");
        assert!(advice.contains("cargo install bpf-linker --version 0.13.0"), "{advice}");
    }
}
