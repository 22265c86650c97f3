//! Removes everything that agents left on the node.

use std::path::Path;

use crate::{error::Error, guard, pins, sys::links::PinnedLink};

/// Whether any agent has pins below `bpffs`.
#[must_use]
pub fn is_installed(bpffs: &Path) -> bool {
    pins::layouts(bpffs).is_ok_and(|folders| !folders.is_empty())
}

/// Detaches every link below `bpffs`, of every layout, and leaves the pins. It is for a hung agent, before [`uninstall`]:
/// links that the agent holds open would stay attached without pins. A live agent restores them.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Bpf`] for the first link that can't be detached.
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

/// Removes the pins below `bpffs`, of every layout: links first, which detaches programs that no agent holds open, then
/// maps, then folders. Then removes the guard's routing rules and filters. Returns what it removed. A clean node is no
/// error.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Guard`] for the first that can't be removed.
pub fn uninstall(bpffs: &Path) -> Result<Vec<String>, Error> {
    let folders = pins::layouts(bpffs)?.into_iter().map(|(_, folder)| folder).collect();
    let pins = pins::remove(folders)?;
    let mut removed: Vec<String> = pins.iter().map(|path| path.display().to_string()).collect();
    removed.extend(guard::uninstall()?);
    Ok(removed)
}
