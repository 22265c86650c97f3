//! The one image of the lab's containers: a static busybox, in the format that `docker save` writes.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// Its name, of no registry.
pub const NAME: &str = "lab.invalid/busybox:1";
/// Debian's package `busybox-static`.
pub(super) const BUSYBOX: &str = "/bin/busybox";

/// Writes it into `folder`; the archive's path. Its command sleeps, so that it serves for sandboxes too.
pub(super) fn write(folder: &Path) -> Result<PathBuf> {
    let (root, image) = (folder.join("root"), folder.join("image"));
    for made in [root.join("bin"), root.join("tmp"), image.clone()] {
        fs::create_dir_all(&made).with_context(|| format!("making {}", made.display()))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).with_context(|| format!("copying {BUSYBOX}"))?;
    symlink("busybox", root.join("bin/sh")).context("making /bin/sh")?;
    let layer = image.join("layer.tar");
    pack(&root, &["."], &layer)?;
    let layer = fs::read(&layer).context("reading the layer")?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": { "Cmd": ["/bin/busybox", "sleep", "2147483647"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest(&layer)?)] },
    });
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"] }]);
    fs::write(image.join("config.json"), config.to_string()).context("writing the config")?;
    fs::write(image.join("manifest.json"), manifest.to_string()).context("writing the manifest")?;
    let archive = folder.join("image.tar");
    pack(&image, &["manifest.json", "config.json", "layer.tar"], &archive)?;
    Ok(archive)
}

fn pack(folder: &Path, names: &[&str], archive: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(folder).args(["--owner=0", "--group=0", "-cf"]).arg(archive).args(names);
    let output = tar.output().context("starting tar")?;
    if !output.status.success() {
        bail!("tar said {:?}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> Result<String> {
    let mut hex = String::new();
    for byte in Sha256::digest(bytes) {
        write!(hex, "{byte:02x}").context("writing a digest")?;
    }
    Ok(hex)
}

/// As Go names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
