//! Taking everything away again.

use std::path::{Path, PathBuf};

use super::{Error, pins};

/// Removes the pins below `bpffs`, of every layout: links first, which detaches the programs, then the maps,
/// then the folders. Says what it removed; nothing there is no error.
///
/// # Errors
///
/// [`Error::File`] for what could not be removed.
pub fn uninstall(bpffs: &Path) -> Result<Vec<PathBuf>, Error> {
    pins::remove(pins::layouts(bpffs)?.into_iter().map(|(_, folder)| folder).collect())
}
