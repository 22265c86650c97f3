//! Who is at the other end: 4-tuple to cgroup to pod UID.

mod cgroups;
mod kernel;
mod node;

pub use self::{cgroups::CgroupPaths, kernel::KernelResolver, node::NodeAddresses};

use crate::pods::{Client, ClientResolver, Connection, Unattested};

/// `--identity=source-ip`: the source address is all that is known, as in kiam.
#[derive(Clone, Copy, Debug, Default)]
pub struct SourceIpResolver;

// === impl SourceIpResolver ===

impl ClientResolver for SourceIpResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        Ok(Client::Address(connection.peer.ip().to_canonical()))
    }
}
