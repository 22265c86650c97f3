//! A real container runtime on the lab's node: containerd with runc and CNI plugins, driven as the kubelet drives it.
//!
//! It is installed, and not ours; what is ours is where it runs: in the node's network namespace, below the node's
//! cgroup, which it sees as the root of a node that has cgroup v2 alone, and in a mount namespace of its own, where
//! all that it and the plugins keep is on a tmpfs. So everything of it goes when its processes are killed.

mod containerd;
mod cri;
mod image;
mod kubelet;
mod messages;
mod oci;
mod shape;

pub use containerd::{Containerd, Handler, import, network_config, unready};
pub use image::{NAME as IMAGE, busybox, write_busybox, write_image};
pub use kubelet::{Container, Exited, Kubelet, Sandbox};
pub use shape::{Bind, CgroupDriver, Processes, Shape};

use super::NO_SKIP;

/// Whether the calling test must be left out, as there is no runtime; prints the reason.
///
/// # Panics
///
/// When it must, and [`NO_SKIP`] is set.
#[must_use]
pub fn skip(test: &str) -> bool {
    let Err(reason) = Containerd::available() else { return false };
    assert!(
        std::env::var_os(NO_SKIP).is_none(),
        "{test} can't run, and {NO_SKIP} is set: {reason}"
    );
    eprintln!("skipped: {test}: {reason}");
    true
}
