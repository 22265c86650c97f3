//! The pods' claims on network namespaces, and the listeners inherited from the previous agent.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    net::TcpListener,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::sys::cookie_of;
use kiam_core::pods::PodUid;

/// All claims. Each namespace belongs to one pod, and the node's own to none. Cheap to clone.
///
/// Namespaces are identified by inode number, which is unique while a descriptor keeps the namespace alive. Every number
/// in here has one.
#[derive(Clone, Debug)]
pub(super) struct Claims(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    nodes: HashSet<u64>,
    pods: Mutex<HashMap<u64, PodUid>>,
    /// Inherited listeners, by the cookie of their namespace.
    inherited: Mutex<HashMap<u64, Vec<TcpListener>>>,
}

/// A pod's claim on a namespace, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    inode: u64,
    claims: Claims,
    // Dropped last, so that the inode number stays unique until the claim is gone.
    namespace: File,
}

// === impl Claims ===

impl Claims {
    /// No claims. The node's namespaces are that of the calling thread and that of the first process.
    pub(super) fn new(inherited: Vec<TcpListener>) -> io::Result<Self> {
        let mut nodes = HashSet::from([fs::metadata("/proc/thread-self/ns/net")?.ino()]);
        // In its own PID namespace the agent is the first process.
        nodes.extend(fs::metadata("/proc/1/ns/net").map(|first| first.ino()));
        let mut by_cookie: HashMap<u64, Vec<TcpListener>> = HashMap::new();
        for listener in inherited {
            by_cookie.entry(cookie_of(&listener)?).or_default().push(listener);
        }
        let (pods, inherited) = (Mutex::default(), Mutex::new(by_cookie));
        Ok(Self(Arc::new(Shared { nodes, pods, inherited })))
    }

    /// Whether `inode` is the node's own namespace.
    pub(super) fn is_nodes(&self, inode: u64) -> bool {
        self.0.nodes.contains(&inode)
    }

    /// Claims `namespace` for `pod`, or returns the pod that has it.
    pub(super) fn claim(&self, inode: u64, namespace: File, pod: &PodUid) -> Result<Claim, PodUid> {
        let mut pods = self.pods();
        if let Some(owner) = pods.get(&inode) {
            return Err(owner.clone());
        }
        pods.insert(inode, pod.clone());
        drop(pods);
        Ok(Claim { inode, claims: self.clone(), namespace })
    }

    /// Removes and returns the inherited listeners of the namespace `cookie`.
    pub(super) fn inherited(&self, cookie: u64) -> Vec<TcpListener> {
        let mut inherited = self.0.inherited.lock().unwrap_or_else(PoisonError::into_inner);
        inherited.remove(&cookie).unwrap_or_default()
    }

    /// Closes the inherited listeners that no pod has claimed.
    pub(super) fn drop_inherited(&self) {
        self.0.inherited.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<u64, PodUid>> {
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Claim ===

impl Claim {
    /// The namespace's inode number.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// The namespace.
    pub(super) fn namespace(&self) -> &File {
        &self.namespace
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.pods().remove(&self.inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_the_first_pods_until_that_lets_go_and_the_nodes_is_nobodys() {
        let claims = Claims::new(Vec::new()).unwrap();
        let own = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        assert!(claims.is_nodes(own) && !claims.is_nodes(own + 1));
        let (a, b) = (PodUid::new("a"), PodUid::new("b"));
        let file = || File::open("/proc/self/ns/net").unwrap();
        let claim = claims.claim(7, file(), &a).unwrap();
        assert_eq!(claims.claim(7, file(), &b).unwrap_err(), a);
        assert_eq!(claims.claim(7, file(), &a).unwrap_err(), a);
        drop(claim);
        assert!(claims.claim(7, file(), &b).is_ok());
    }
}
