//! Embeds the kernel object, which `cargo xtask build-ebpf` builds.

use std::{env, fs, path::Path, time::SystemTime};

const SOURCES: [&str; 2] = ["../../kiam-ebpf/src", "../../kiam-common/src"];
/// If set where the object is missing, an agent is built that can't intercept, for `cargo xtask demo --rootless`.
const WITHOUT: &str = "KIAM_WITHOUT_KERNEL_OBJECT";

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let object = Path::new(&root).join("../../kiam-ebpf/out/kiam.bpf.o");
    println!("cargo::rerun-if-env-changed={WITHOUT}");
    if !object.exists() && env::var_os(WITHOUT).is_some() {
        embed_nothing();
        return;
    }
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
}

/// An empty object in place of the real one: the agent refuses to intercept with it. Never in a release build.
fn embed_nothing() {
    if env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo::error=a release build needs the kernel object: unset {WITHOUT}");
        return;
    }
    let out = env::var("OUT_DIR").expect("cargo sets it for build scripts");
    let nothing = Path::new(&out).join("none.o");
    fs::write(&nothing, []).expect("cargo's own folder can be written");
    println!("cargo::rustc-env=KIAM_BPF_OBJECT={}", nothing.display());
}

fn newest(folder: &Path) -> Option<SystemTime> {
    let files = fs::read_dir(folder).ok()?.flatten();
    files.filter_map(|file| modified(&file.path())).max()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}
