//! Compiles the kernel program, and the programs of the workspace.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::command::{self, command, say, workspace};
use crate::toolchain::{self, Route, Toolchain};

const OBJECT: &str = "kiam-ebpf/out/kiam.bpf.o";

/// Compiles the kernel program and puts the object where `kiam-agent` embeds it from.
pub fn ebpf() -> Result<()> {
    let toolchain = toolchain::ensure()?;
    say(format!("building the kernel program with {}", toolchain.route));
    command::run(&mut build(&toolchain))?;
    let built = workspace().join("target/bpf/bpfel-unknown-none/bpf/kiam-ebpf");
    let object = workspace().join(OBJECT);
    let content = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let content = without_debug_information(&content)
        .with_context(|| format!("cannot read {} as an object", built.display()))?;
    if is_current(&object, &built, &content) {
        say(format!("{OBJECT} is up to date"));
        return Ok(());
    }
    let folder = object.parent().expect("the object is in a folder");
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(&object, content).with_context(|| format!("cannot write {OBJECT}"))?;
    say(format!("{OBJECT} is new"));
    Ok(())
}

/// The object without DWARF, which is five sixths of it and which nothing on a node reads. The BTF, for which it was made,
/// stays.
fn without_debug_information(content: &[u8]) -> object::build::Result<Vec<u8>> {
    let mut object = Builder::read(content)?;
    for section in &mut object.sections {
        let name = section.name.strip_prefix(b".rel").unwrap_or(&section.name);
        section.delete = name.starts_with(b".debug_");
        // The linker has the names of symbols and of sections in one table, and the library writes one for each.
        if let SectionData::SectionString = section.data {
            section.data = SectionData::String;
        }
    }
    let names = object.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    object.delete_orphan_symbols();
    object.delete_orphan_relocations();
    let mut written = Vec::new();
    object.write(&mut written)?;
    Ok(written)
}

/// Machines are little-endian wherever kiam runs (x86_64, aarch64), so the object is `bpfel` for all of them.
fn build(toolchain: &Toolchain) -> Command {
    let mut build = command("cargo");
    match toolchain.route {
        // aya-ebpf uses `asm_experimental_arch`, which a stable compiler takes only with this variable.
        Route::Debian => build.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", toolchain::DEBIAN_RUSTC),
        Route::Nightly => build.arg("+nightly"),
    };
    build.arg("build").args(["--profile", "bpf", "--target", "bpfel-unknown-none"]);
    build.args(["--package", "kiam-ebpf", "--target-dir", "target/bpf"]);
    if toolchain.route == Route::Nightly {
        build.args(["-Z", "build-std=core"]);
    }
    build.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker);
    let flags = format!("-C link-arg=--btf -C debuginfo=2 {}", remapped());
    build.env("RUSTFLAGS", flags);
    build
}

/// Compiler flags that keep this machine's paths out of what is compiled.
#[must_use]
pub fn remapped() -> String {
    let flag = |path: &Path, name: &str| format!("--remap-path-prefix={}={name}", path.display());
    format!("{} {}", flag(&cargo_home(), "/cargo"), flag(workspace(), "/kiam-ebpf"))
}

fn cargo_home() -> PathBuf {
    let set = env::var_os("CARGO_HOME").map(PathBuf::from);
    set.or_else(|| Some(env::home_dir()?.join(".cargo"))).unwrap_or_default()
}

/// Lints the kernel program as if it were for this machine: no toolchain has both clippy and `core` for BPF, and what
/// clippy looks at is the same.
pub fn ebpf_lints() -> Command {
    let mut lints = command("cargo");
    lints.env("RUSTC_BOOTSTRAP", "1");
    lints.args([
        "clippy",
        "--profile",
        "bpf",
        "--package",
        "kiam-ebpf",
        "--target-dir",
        "target/bpf",
    ]);
    lints.args(["--", "-D", "warnings"]);
    lints
}

/// Compiles the agent and the lab, whose pods run its command. All members at once, so that features are what
/// `cargo test` has too, and nothing is compiled twice.
///
/// # Errors
///
/// When they do not compile.
pub fn programs() -> Result<()> {
    command::run(command("cargo").args(["build", "--bins"]))
}

/// Compiles what the demo needs, and nothing else: the agent, and the lab.
///
/// # Errors
///
/// When they do not compile.
pub fn demo() -> Result<()> {
    command::run(command("cargo").args(["build", "--package", "kiam-agent", "--package", "lab"]))
}

/// As [`demo`], but an agent without the kernel object will do where that is not built.
///
/// # Errors
///
/// When they do not compile.
pub fn rootless_demo() -> Result<()> {
    let mut build = command("cargo");
    build.args(["build", "--package", "kiam-agent", "--package", "lab"]);
    if !workspace().join(OBJECT).exists() {
        build.env("KIAM_WITHOUT_KERNEL_OBJECT", "1");
    }
    command::run(&mut build)
}

/// Compiles the lab alone.
///
/// # Errors
///
/// When it does not compile.
pub fn lab() -> Result<()> {
    command::run(command("cargo").args(["build", "--package", "lab"]))
}

/// Whether `object` has `content`, which was made of `built`. The agent compares its time with that of the sources.
fn is_current(object: &Path, built: &Path, content: &[u8]) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    modified(object) >= modified(built) && fs::read(object).is_ok_and(|it| it == content)
}
