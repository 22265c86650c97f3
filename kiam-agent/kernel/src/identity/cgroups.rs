//! Maps cgroup ids to pods, without walking.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::sys::Cgroup;
use kiam_core::{
    pods::{ContainerId, PodUid, Unattested},
    role::QuotedText,
};

/// Pods whose cgroups are cached: more than a node runs. A full cache is cleared.
const CACHED_PODS: usize = 1024;
/// Cgroups of one pod that are cached. A pod with more is looked up again, and no other pod is. A look-up takes 4 to 10
/// µs.
const CGROUPS: usize = 64;

/// The map from cgroups to pods; cheap to clone.
#[derive(Clone, Debug)]
pub struct CgroupPaths(Arc<Mutex<Paths>>);

#[derive(Debug)]
struct Paths {
    root: Cgroup,
    known: CgroupCache,
}

/// A cache of results, which stay valid, since ids are not reused within a boot.
#[derive(Debug, Default)]
struct CgroupCache {
    pods: HashMap<u64, Member>,
    /// The cached cgroups of each pod.
    cgroups: HashMap<PodUid, Vec<u64>>,
}

/// The pod and the container that a cgroup belongs to. The pod's own cgroup is of no container.
type Member = (PodUid, Option<ContainerId>);

// === impl CgroupPaths ===

impl CgroupPaths {
    /// A map for cgroups below `root`, the pods' cgroup.
    #[must_use]
    pub fn new(root: Cgroup) -> Self {
        Self(Arc::new(Mutex::new(Paths { root, known: CgroupCache::default() })))
    }

    /// Replaces the pods' cgroup.
    pub fn follow(&self, root: Cgroup) {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paths.root = root;
    }

    /// The pod whose cgroup is `id` or an ancestor of it.
    ///
    /// # Errors
    ///
    /// [`Unattested::Gone`] when the cgroup was removed, [`Unattested::NotAPod`] when it is below no pod.
    pub fn pod(&self, id: u64) -> Result<PodUid, Unattested> {
        self.member(id).map(|(uid, _)| uid)
    }

    /// As [`Self::pod`], with the container.
    ///
    /// # Errors
    ///
    /// As [`Self::pod`].
    pub fn member(&self, id: u64) -> Result<(PodUid, Option<ContainerId>), Unattested> {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(member) = paths.known.pods.get(&id) {
            return Ok(member.clone());
        }
        let path = paths.root.path_of(id).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE) => Unattested::Gone(id),
            _ => Unattested::Unreadable(format!("cgroup {id}: {error}")),
        })?;
        let below = path.strip_prefix(paths.root.path()).ok();
        let uid = below.and_then(PodUid::from_cgroup_path);
        let uid =
            uid.ok_or_else(|| Unattested::NotAPod(QuotedText::new(&path.to_string_lossy())))?;
        let container = below.and_then(ContainerId::from_cgroup_path);
        paths.known.remember(id, &uid, container.clone());
        Ok((uid, container))
    }
}

// === impl CgroupCache ===

impl CgroupCache {
    fn remember(&mut self, id: u64, uid: &PodUid, container: Option<ContainerId>) {
        if !self.cgroups.contains_key(uid) && self.cgroups.len() >= CACHED_PODS {
            *self = Self::default();
        }
        let own = self.cgroups.entry(uid.clone()).or_default();
        if own.len() >= CGROUPS {
            own.drain(..).for_each(|id| drop(self.pods.remove(&id)));
        }
        if self.pods.insert(id, (uid.clone(), container)).is_none() {
            own.push(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::{
            fd::{AsFd as _, BorrowedFd, OwnedFd},
            unix::fs::MetadataExt as _,
        },
    };

    use lab::Cgroup;
    use rustix::fs::{AtFlags, Mode, OFlags, fstat, mkdirat, openat, unlinkat};

    use super::*;
    use crate::sys;

    const A: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
    const B: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";

    /// Cgroups one in the other, deeper than a path can say; Drop removes them from the inside.
    struct Deep(Vec<OwnedFd>, String);

    impl Deep {
        fn create(top: BorrowedFd<'_>, name: String, depth: usize) -> Self {
            let mut deep = Self(vec![top.try_clone_to_owned().unwrap()], name);
            for _ in 0..depth {
                let above = deep.0.last().unwrap();
                mkdirat(above, &deep.1, Mode::RWXU).unwrap();
                let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
                deep.0.push(openat(above, &deep.1, flags, Mode::empty()).unwrap());
            }
            deep
        }

        fn id(&self) -> u64 {
            fstat(self.0.last().unwrap()).unwrap().st_ino
        }
    }

    impl Drop for Deep {
        fn drop(&mut self) {
            while self.0.len() > 1 {
                self.0.pop();
                unlinkat(self.0.last().unwrap(), &self.1, AtFlags::REMOVEDIR).unwrap();
            }
        }
    }

    fn root(name: &str) -> Option<Cgroup> {
        if lab::skip!() {
            return None;
        }
        let mount = lab::cgroup_mount_point().unwrap();
        let path = mount.join(format!("kiam-test-{name}-{}", std::process::id()));
        Some(Cgroup::create(path).unwrap())
    }

    #[test]
    fn cgroups_are_their_pods_by_depth_whatever_they_are_called() {
        let Some(root) = root("cgroups_by_depth") else { return };
        let blocking = kiam_core::blocking::Blocking::here().unwrap();
        let paths = CgroupPaths::new(sys::Cgroup::open(&blocking, Some(root.path())).unwrap());
        let under = B.replace('-', "_");
        let container = format!("burstable/pod{A}/0123");
        for (path, expected) in [
            (container.clone(), Some(A)),
            (format!("{container}/pod{B}"), Some(A)),
            (format!("{container}/kubepods-burstable-pod{under}.slice/0123"), Some(A)),
            (format!("{container}/evil\u{1b}[2J'\"\\x2d"), Some(A)),
            (format!("kubepods-pod{under}.slice/crio-1.scope"), Some(B)),
            (format!("mine/pod{B}/0123"), None),
            (format!("burstable/mine\u{1b}[2J/pod{B}"), None),
            ("besteffort".to_owned(), None),
        ] {
            let cgroup = root.path().join(&path);
            fs::create_dir_all(&cgroup).unwrap();
            let id = fs::metadata(&cgroup).unwrap().ino();
            let found = paths.pod(id);
            match expected {
                Some(uid) => assert_eq!(found, Ok(PodUid::new(uid)), "{path:?}"),
                None => {
                    let refused = found.unwrap_err().to_string();
                    assert!(refused.contains("not a pod"), "{path:?}: {refused}");
                    assert!(!refused.contains('\u{1b}') && refused.len() < 400, "{refused:?}");
                }
            }
            fs::remove_dir(&cgroup).unwrap();
            // What was found stays known; what is not known is gone.
            assert_eq!(paths.pod(id).ok(), expected.map(PodUid::new));
            if expected.is_none() {
                assert_eq!(paths.pod(id), Err(Unattested::Gone(id)));
            }
        }
        let outside = fs::metadata(root.path().parent().unwrap()).unwrap().ino();
        assert!(matches!(paths.pod(outside), Err(Unattested::NotAPod(_))));
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_and_no_other() {
        let Some(root) = root("path_too_long") else { return };
        let blocking = kiam_core::blocking::Blocking::here().unwrap();
        let paths = CgroupPaths::new(sys::Cgroup::open(&blocking, Some(root.path())).unwrap());
        let pod = |uid: &str| {
            let path = root.path().join(format!("burstable/pod{uid}/0123"));
            fs::create_dir_all(&path).unwrap();
            File::open(path).unwrap()
        };
        let (a, b) = (pod(A), pod(B));
        let fits = Deep::create(a.as_fd(), "x".repeat(250), 14);
        assert_eq!(paths.pod(fits.id()), Ok(PodUid::new(A)));
        drop(fits);
        let disguised = format!("pod{B}{}", "x".repeat(200));
        let deep = Deep::create(a.as_fd(), disguised, 18);
        let refused = paths.pod(deep.id()).unwrap_err();
        assert!(matches!(&refused, Unattested::Unreadable(_)), "{refused}");
        assert!(refused.to_string().len() < 400, "{refused}");
        for (directory, uid) in [(&a, A), (&b, B)] {
            assert_eq!(paths.pod(directory.metadata().unwrap().ino()), Ok(PodUid::new(uid)));
        }
    }

    #[test]
    fn a_pod_with_many_cgroups_takes_no_other_pods_place() {
        let mut known = CgroupCache::default();
        let (many, other) = (PodUid::new(A), PodUid::new(B));
        known.remember(0, &other, None);
        for id in 1..100_000 {
            known.remember(id, &many, None);
            known.remember(id, &many, None);
        }
        assert_eq!(known.pods.get(&0), Some(&(other, None)));
        assert!(known.pods.contains_key(&99_999) && known.pods.len() <= CGROUPS + 1);
        for n in 0..10_000_u32 {
            known.remember(u64::from(n) + 200_000, &PodUid::new(&format!("{n:032x}")), None);
            assert!(
                known.cgroups.len() <= CACHED_PODS && known.pods.len() <= CACHED_PODS + CGROUPS
            );
        }
    }
}
