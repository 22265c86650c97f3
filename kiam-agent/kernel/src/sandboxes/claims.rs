//! Which pod holds which network namespace, and what an agent before this one has opened there.

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

/// Each namespace is one pod's, and the node's own is nobody's. Cheap to clone.
///
/// Namespaces go by inode number: it is that namespace's for as long as a descriptor keeps it alive, and every
/// number in here has one.
#[derive(Clone, Debug)]
pub(super) struct Claims(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    nodes: HashSet<u64>,
    pods: Mutex<HashMap<u64, PodUid>>,
    /// By the cookie of the namespace that they are in.
    inherited: Mutex<HashMap<u64, Vec<TcpListener>>>,
}

/// A namespace that is one pod's until this is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    inode: u64,
    claims: Claims,
    // Dropped after the claim was taken back, so that the number means this one until then.
    namespace: File,
}

// === impl Claims ===

impl Claims {
    /// The calling thread's namespace, and that of the first process, are the node's.
    pub(super) fn new(inherited: Vec<TcpListener>) -> io::Result<Self> {
        let mut nodes = HashSet::from([fs::metadata("/proc/thread-self/ns/net")?.ino()]);
        // In a PID namespace of its own the agent is the first.
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

    /// Makes `namespace` that of `pod`; else tells whose it is.
    pub(super) fn claim(&self, inode: u64, namespace: File, pod: &PodUid) -> Result<Claim, PodUid> {
        let mut pods = self.pods();
        if let Some(owner) = pods.get(&inode) {
            return Err(owner.clone());
        }
        pods.insert(inode, pod.clone());
        drop(pods);
        Ok(Claim { inode, claims: self.clone(), namespace })
    }

    /// What was inherited for the namespace `cookie`, once.
    pub(super) fn inherited(&self, cookie: u64) -> Vec<TcpListener> {
        let mut inherited = self.0.inherited.lock().unwrap_or_else(PoisonError::into_inner);
        inherited.remove(&cookie).unwrap_or_default()
    }

    /// Closes what was inherited and is no pod's any more.
    pub(super) fn drop_inherited(&self) {
        self.0.inherited.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<u64, PodUid>> {
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Claim ===

impl Claim {
    /// The namespace's number.
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
