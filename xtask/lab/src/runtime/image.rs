//! The one image of the lab's containers: a static busybox.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;
use xtask::oci::{Layout, Root, Settings};

/// Its name, of no registry.
pub const NAME: &str = "lab.invalid/busybox:1";
/// Debian's package `busybox-static`.
pub(super) const BUSYBOX: &str = "/bin/busybox";

/// Writes it into `folder`; the archive's path. Its command sleeps, so that it serves for sandboxes too.
pub(super) fn write(folder: &Path) -> Result<PathBuf> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("reading {BUSYBOX}"))?;
    let mut root = Root::default();
    root.file("bin/busybox", 0o755, busybox).link("bin/sh", "busybox").folder("tmp", 0o1777);
    let mut layout = Layout::new(NAME, 0);
    let settings = Settings {
        architecture: architecture().to_owned(),
        created: 0,
        config: json!({ "Cmd": ["/bin/busybox", "sleep", "2147483647"] }),
        annotations: [].into(),
    };
    layout.add(&root, &settings)?;
    let archive = folder.join("image.tar");
    layout.write_archive(&archive)?;
    Ok(archive)
}

/// As Go names it.
fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
