//! The folders of pins, `<bpffs>/v<layout>`, named by the layout of the maps, and the locks on them.

pub(crate) mod locks;

pub use self::locks::{AgentLock, AttachLock, UninstallLock, lock_for_uninstall};

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use kiam_common::LAYOUT;

use crate::{error::Error, sys::links::PinnedLink};

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// The suffix of a pin that is about to be renamed over another.
pub(crate) const DRAFT: &str = "_new";

/// Creates the folder of this layout, for root alone. Returns it and the folders of older layouts.
pub(crate) fn open(bpffs: &Path) -> Result<(PathBuf, Vec<PathBuf>), Error> {
    let older = check(bpffs)?;
    let pins = current(bpffs);
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&pins);
    made.map_err(|source| unmade(bpffs, source))?;
    Ok((pins, older))
}

/// Whether pins may go below `bpffs`, which need not exist yet. Returns the folders of older layouts.
pub(crate) fn check(bpffs: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut nearest = bpffs;
    while !nearest.exists() {
        nearest = nearest.parent().ok_or(Error::NotBpffs { path: bpffs.to_owned() })?;
    }
    let system = rustix::fs::statfs(nearest).map_err(|error| unmade(bpffs, error.into()))?;
    if u64::try_from(system.f_type).ok() != Some(BPF_FS_MAGIC) {
        return Err(Error::NotBpffs { path: bpffs.to_owned() });
    }
    let mut others = layouts(bpffs)?;
    if let Some((number, path)) = others.iter().find(|(number, _)| *number > LAYOUT) {
        return Err(Error::NewerLayout { path: path.clone(), number: *number, layout: LAYOUT });
    }
    others.retain(|(number, _)| *number < LAYOUT);
    Ok(others.into_iter().map(|(_, path)| path).collect())
}

fn unmade(bpffs: &Path, source: io::Error) -> Error {
    Error::File { what: "make the pins' folder", path: bpffs.to_owned(), source }
}

/// The folder of this layout.
pub(crate) fn current(bpffs: &Path) -> PathBuf {
    bpffs.join(format!("v{LAYOUT}"))
}

/// The folders of all layouts below `bpffs`, oldest first.
pub(crate) fn layouts(bpffs: &Path) -> Result<Vec<(u32, PathBuf)>, Error> {
    let entries = match fs::read_dir(bpffs) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(Error::File { what: "read", path: bpffs.to_owned(), source });
        }
    };
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix('v')?.parse().ok();
    let paths = entries.flatten().map(|entry| entry.path());
    let mut found: Vec<(u32, PathBuf)> =
        paths.filter_map(|path| Some((number(&path)?, path))).collect();
    found.sort();
    Ok(found)
}

/// Pins the links of `older` layouts in `pins` too, if they are missing there. They are then updated in place, so that the
/// programs are never detached.
pub(crate) fn adopt(pins: &Path, older: &[PathBuf], programs: &[&str]) -> Result<(), Error> {
    // The newest first.
    for folder in older.iter().rev() {
        for program in programs {
            let (from, to) = (link(folder, program), link(pins, program));
            if PinnedLink::open(&to)?.is_none()
                && let Some(link) = PinnedLink::open(&from)?
            {
                link.pin(&to)?;
            }
        }
    }
    Ok(())
}

/// Removes the leftovers of an interrupted start from `pins`, and the `older` layouts, whose links were adopted or are of
/// programs that no longer exist.
pub(crate) fn tidy(pins: &Path, older: &[PathBuf]) -> Result<(), Error> {
    for file in files(pins)? {
        if file.to_string_lossy().ends_with(DRAFT) {
            remove_file(&file)?;
        }
    }
    remove(older.to_vec()).map(drop)
}

/// Whether nothing is pinned in `folder`.
pub(crate) fn is_empty(folder: &Path) -> Result<bool, Error> {
    Ok(files(folder)?.is_empty())
}

/// Removes everything in `folder` except links.
pub(crate) fn remove_maps(folder: &Path) -> Result<(), Error> {
    for file in files(folder)?.iter().filter(|file| !is_link(file)) {
        remove_file(file)?;
    }
    Ok(())
}

/// Removes the folders with their content, links before maps, and returns what it removed.
pub(crate) fn remove(folders: Vec<PathBuf>) -> Result<Vec<PathBuf>, Error> {
    let mut pinned = Vec::new();
    for folder in &folders {
        pinned.extend(files(folder)?);
    }
    // Links before maps: `false` sorts first.
    pinned.sort_by_key(|path| (!is_link(path), path.clone()));
    let mut removed = Vec::new();
    for file in pinned {
        if remove_file(&file)? {
            removed.push(file);
        }
    }
    for folder in folders {
        match fs::remove_dir(&folder) {
            Ok(()) => removed.push(folder),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::File { what: "remove", path: folder, source }),
        }
    }
    Ok(removed)
}

fn remove_file(file: &Path) -> Result<bool, Error> {
    match fs::remove_file(file) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::File { what: "remove", path: file.to_owned(), source }),
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::File { what: "read", path: folder.to_owned(), source }),
    }
}

/// The pins of links in `folder`.
pub(crate) fn links(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut links = files(folder)?;
    links.retain(|file| is_link(file));
    Ok(links)
}

fn is_link(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link_"))
}

/// The pin of the link of `program`.
pub(crate) fn link(folder: &Path, program: &str) -> PathBuf {
    folder.join(format!("link_{program}"))
}
