//! Embeds the kernel object, which `cargo xtask build-ebpf` builds.

use std::{env, fs, path::Path, process::Command, time::SystemTime};

const SOURCES: [&str; 2] = ["../kiam-ebpf/src", "../kiam-common/src"];

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let object = Path::new(&root).join("../kiam-ebpf/out/kiam.bpf.o");
    println!("cargo::rerun-if-changed={}", object.display());
    for folder in SOURCES {
        println!("cargo::rerun-if-changed={folder}");
    }
    let Some(built) = modified(&object) else {
        println!(
            "cargo::error=the kernel object is missing: build it with `cargo xtask build-ebpf`"
        );
        return;
    };
    let newest = SOURCES.iter().filter_map(|folder| newest(&Path::new(&root).join(folder))).max();
    if newest > Some(built) {
        println!(
            "cargo::warning=the kernel object is older than its sources: run `cargo xtask build-ebpf`"
        );
    }
    println!("cargo::rustc-env=KIAM_BPF_OBJECT={}", object.display());
    println!("cargo::rerun-if-env-changed=KIAM_COMMIT");
    println!("cargo::rerun-if-changed=../.git/logs/HEAD");
    println!("cargo::rustc-env=KIAM_COMMIT={}", commit());
}

fn commit() -> String {
    let given = env::var("KIAM_COMMIT").ok();
    given.or_else(git).unwrap_or_else(|| "unknown".to_owned())
}

fn git() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn newest(folder: &Path) -> Option<SystemTime> {
    let files = fs::read_dir(folder).ok()?.flatten();
    files.filter_map(|file| modified(&file.path())).max()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}
