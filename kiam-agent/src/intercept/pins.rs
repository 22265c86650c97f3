//! Where the programs' links and maps are pinned.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use kiam_common::LAYOUT;

use super::Error;

/// The name of the pin of `program`'s link.
pub(super) fn link(program: &str) -> String {
    format!("link_{program}")
}

/// Makes `<bpffs>/v<layout>`, for root alone.
pub(super) fn folder(bpffs: &Path) -> Result<PathBuf, Error> {
    let failed =
        |source| Error::File { what: "make the pins' folder", path: bpffs.to_owned(), source };
    let mut nearest = bpffs;
    while !nearest.exists() {
        nearest = nearest.parent().ok_or(Error::NotBpffs { path: bpffs.to_owned() })?;
    }
    let system = rustix::fs::statfs(nearest).map_err(|error| failed(error.into()))?;
    if u64::try_from(system.f_type).ok() != Some(0xcafe_4a11) {
        return Err(Error::NotBpffs { path: bpffs.to_owned() });
    }
    let pins = bpffs.join(format!("v{LAYOUT}"));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&pins).map_err(failed)?;
    for entry in fs::read_dir(bpffs).map_err(failed)?.flatten() {
        if entry.path() != pins && entry.file_name().to_string_lossy().starts_with('v') {
            return Err(Error::OtherLayout { path: entry.path(), layout: LAYOUT });
        }
    }
    Ok(pins)
}
