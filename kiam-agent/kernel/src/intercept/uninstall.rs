//! Taking everything away again.

use std::path::Path;

use crate::{error::Error, guard, pins, sys::links::PinnedLink};

/// Whether something is pinned below `bpffs`, by whatever agent.
#[must_use]
pub fn is_installed(bpffs: &Path) -> bool {
    pins::layouts(bpffs).is_ok_and(|folders| !folders.is_empty())
}

/// Detaches every link that is pinned below `bpffs`, of every layout, and leaves the pins. Before [`uninstall`], where an agent
/// hangs: what it holds open stays attached without pins. One that lives puts it back.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Bpf`] for the first that could not be detached.
pub fn detach(bpffs: &Path) -> Result<(), Error> {
    for (_, folder) in pins::layouts(bpffs)? {
        for pin in pins::links(&folder)? {
            if let Some(link) = PinnedLink::open(&pin)? {
                link.detach(&pin)?;
            }
        }
    }
    Ok(())
}

/// Removes the pins below `bpffs`, of every layout: links first, which detaches the programs that no agent holds, then the maps,
/// then the folders; and the guard's routing rules and filters. Says what it removed; nothing there is no error.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Guard`] for what could not be removed.
pub fn uninstall(bpffs: &Path) -> Result<Vec<String>, Error> {
    let folders = pins::layouts(bpffs)?.into_iter().map(|(_, folder)| folder).collect();
    let pins = pins::remove(folders)?;
    let mut removed: Vec<String> = pins.iter().map(|path| path.display().to_string()).collect();
    removed.extend(guard::uninstall()?);
    Ok(removed)
}
