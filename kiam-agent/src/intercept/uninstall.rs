//! Taking everything away again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use kiam_common::LAYOUT;

use super::{Error, guard};

/// Removes the pins below `bpffs`, which detaches the programs, and the guard's routing rules. Says what it removed;
/// nothing there is no error.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Guard`] for what could not be removed.
pub fn uninstall(bpffs: &Path) -> Result<Vec<String>, Error> {
    let pins = remove_pins(bpffs)?;
    let mut removed: Vec<String> = pins.iter().map(|path| path.display().to_string()).collect();
    removed.extend(guard::uninstall()?);
    Ok(removed)
}

/// Links first, which detaches the programs, then the maps, then the folder.
fn remove_pins(bpffs: &Path) -> Result<Vec<PathBuf>, Error> {
    let pins = bpffs.join(format!("v{LAYOUT}"));
    let failed =
        |path: &Path, source| Error::File { what: "remove", path: path.to_owned(), source };
    let entries = match fs::read_dir(&pins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(&pins, error)),
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    // Links before maps: `false` sorts first.
    files.sort_by_key(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        (!name.is_some_and(|name| name.starts_with("link_")), path.clone())
    });
    for file in &files {
        fs::remove_file(file).map_err(|error| failed(file, error))?;
    }
    fs::remove_dir(&pins).map_err(|error| failed(&pins, error))?;
    files.push(pins);
    Ok(files)
}
