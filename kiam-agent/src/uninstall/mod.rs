//! `kiam-agent uninstall`: removes what agents have left in the kernel and in the state folder.

mod state;

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::admin;
use kiam_core::lifecycle::ENDING;
use kiam_kernel::intercept::{self, Removal, UninstallError};

/// Why not everything was uninstalled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent waits for a successor.
    #[error(
        "an agent on this node, with pins below {}, was asked to end and serves until another takes over, or its --grace-period ends: try again then, or end it at once by a second SIGTERM", .0.display()
    )]
    Ending(PathBuf),
    /// The kernel's part.
    #[error(transparent)]
    Kernel(#[from] UninstallError),
    /// A file in the state folder can't be removed.
    #[error("remove {path:?}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Uninstalls what is below `bpffs` and in `state_dir`, and the units in the `boot_guard` folder, and prints what was removed;
/// `force` overrides an agent that hangs.
///
/// # Errors
///
/// See [`Error`].
pub fn uninstall(
    bpffs: &Path,
    state_dir: &Path,
    boot_guard: Option<&Path>,
    force: bool,
) -> Result<(), Error> {
    // `lock` is held to the end, so that no agent starts meanwhile.
    let Removal { mut removed, lock } = match intercept::remove_all(bpffs, boot_guard, force) {
        Err(UninstallError::InUse(bpffs)) if is_ending(state_dir) => {
            return Err(Error::Ending(bpffs));
        }
        done => done?,
    };
    let left = state::remove(state_dir, lock.is_some());
    let left = left.map_err(|(path, source)| Error::State { path, source })?;
    removed.extend(left.iter().map(|path| path.display().to_string()));
    for what in &removed {
        println!("removed {what}");
    }
    match removed.is_empty() {
        true => println!("nothing is installed below {}", bpffs.display()),
        false => println!("pods reach the node's metadata service directly now"),
    }
    if lock.is_none() {
        println!(
            "an agent that hangs, or starts, is still there: kill it, for if it recovers, it reattaches everything"
        );
    }
    Ok(())
}

/// Whether the agent that runs waits for a successor, as far as it can be asked.
fn is_ending(state_dir: &Path) -> bool {
    let ready = admin::wait_for(admin::get(state_dir, "/ready"));
    ready.is_ok_and(|(_, body)| body.contains(ENDING))
}
