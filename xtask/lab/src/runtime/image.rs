//! The image of the lab's containers, a static busybox, and what other images of the lab are made with.

use std::{env, fs, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xtask::oci::{Layout, Root, Settings};

/// Its name, of no registry.
pub const NAME: &str = "lab.invalid/busybox:1";
/// Debian's package `busybox-static`.
pub(super) const BUSYBOX: &str = "/bin/busybox";

/// Writes the image as an archive. Its command sleeps, so that it serves for sandboxes too.
///
/// # Errors
///
/// Without a busybox on this machine.
pub(super) fn write(archive: &Path) -> Result<()> {
    write_busybox(Path::new(BUSYBOX), archive)
}

/// Writes an image of this busybox under the name of the lab's.
///
/// # Errors
///
/// Those of the files.
pub fn write_busybox(program: &Path, archive: &Path) -> Result<()> {
    let config = json!({ "Cmd": ["/bin/busybox", "sleep", "2147483647"] });
    write_image(&busybox(program)?, NAME, config, archive)
}

/// The root of an image that has this busybox, and the shell that it is.
///
/// # Errors
///
/// When it cannot be read.
pub fn busybox(program: &Path) -> Result<Root> {
    let program = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let mut root = Root::default();
    root.file("bin/busybox", 0o755, program).link("bin/sh", "busybox").folder("tmp", 0o1777);
    // crun makes no places to mount at.
    root.folder("dev", 0o755).folder("proc", 0o755);
    Ok(root)
}

/// Writes an image of these files, with its `config` as the OCI names it, as an archive.
///
/// # Errors
///
/// When it cannot be written.
pub fn write_image(root: &Root, name: &str, config: Value, archive: &Path) -> Result<()> {
    let mut layout = Layout::new(name, 0);
    let architecture = architecture().to_owned();
    layout.add(root, &Settings { architecture, created: 0, config, annotations: [].into() })?;
    layout.write_archive(archive)
}

/// As Go names it.
fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
