//! Embeds the kernel object, which `cargo xtask build-ebpf` builds.

use std::{env, fs, path::Path, time::SystemTime};

const SOURCES: [&str; 2] = ["../../kiam-ebpf/src", "../../kiam-common/src"];

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let object = Path::new(&root).join("../../kiam-ebpf/out/kiam.bpf.o");
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

fn newest(folder: &Path) -> Option<SystemTime> {
    let files = fs::read_dir(folder).ok()?.flatten();
    files.filter_map(|file| modified(&file.path())).max()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}
