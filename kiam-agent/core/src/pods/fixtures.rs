//! Pods for tests, built up from one that is live and wants nothing.

use std::net::IpAddr;

use super::{Client, Namespace, Origin, Pod, PodUid};

/// The `n`th pod's UID.
pub fn uid(n: u32) -> PodUid {
    PodUid::new(&format!("{n:08x}-0000-4000-8000-000000000000"))
}

/// The `n`th static pod's config hash.
pub fn config_hash(n: u32) -> PodUid {
    PodUid::new(&format!("{n:032x}"))
}

/// A client that the kernel attests, in its pod's own network namespace.
pub fn attested(uid: PodUid, address: &str) -> Client {
    Client::Pod { uid, address: ip(address), origin: Origin::Pod, opener: None }
}

/// The address that `text` is.
///
/// # Panics
///
/// It is none.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("a test's address")
}

/// A namespace without annotations.
pub fn namespace(name: &str, version: u64) -> Namespace {
    Namespace { resource_version: Some(version), ..Namespace::new(name) }
}

impl Pod {
    /// Pod `n`, live, of namespace `default`, at resource version `n`, without addresses or role.
    pub fn test(n: u32) -> Self {
        Self {
            resource_version: Some(u64::from(n)),
            node: Some("node-1".to_owned()),
            ..Self::new(uid(n), "default", &format!("pod-{n}"))
        }
    }

    /// With these addresses.
    #[must_use]
    pub fn at(mut self, addresses: &[&str]) -> Self {
        self.addresses = addresses.iter().map(|address| ip(address)).collect();
        self
    }

    /// At this resource version.
    #[must_use]
    pub fn version(mut self, version: u64) -> Self {
        self.resource_version = Some(version);
        self
    }

    /// Ended.
    #[must_use]
    pub fn over(mut self) -> Self {
        self.live = false;
        self
    }

    /// In the network of its node.
    #[must_use]
    pub fn on_host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// A static pod's mirror.
    #[must_use]
    pub fn mirroring(mut self, namespace: &str, hash: PodUid) -> Self {
        namespace.clone_into(&mut self.namespace);
        self.config_hash = Some(hash);
        self
    }
}
