//! The one way to list cgroups and their processes.
//!
//! Tenants decide how many cgroups and processes there are: a container can create tens of thousands. A [`Walk`] limits the
//! entries and the time of all its listings together, and shows whether it was cut short. It goes as deep as the kubelet,
//! to the pods. Below a pod, one cgroup is listed at a time, each with its own limit.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    marker::PhantomData,
    os::unix::fs::DirEntryExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::Instant;

use kiam_core::{blocking::Blocking, pods::is_qos_class};

/// The most cgroups and processes of one walk: more than a full node has.
const ENTRIES: usize = 1 << 18;
/// The most pods' cgroups, with those of QoS classes: several times the kubelet's `maxPods`.
const PODS: usize = 4096;

/// A bounded walk, on a thread that may block.
#[derive(Debug)]
pub struct Walk<'a> {
    blocking: PhantomData<&'a Blocking>,
    entries: usize,
    until: Instant,
    cut: bool,
}

// === impl Walk ===

impl<'a> Walk<'a> {
    /// A walk of at most `time`, except for a single system call that takes longer.
    #[must_use]
    pub fn new(_: &'a Blocking, time: Duration) -> Self {
        let until = Instant::now() + time;
        Self { blocking: PhantomData, entries: ENTRIES, until, cut: false }
    }

    /// Whether the walk was cut short, by its number of entries or its time.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// The end of the walk's time.
    #[must_use]
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Whether the walk has used up its entries or its time. Then it is cut short.
    pub fn is_over(&mut self) -> bool {
        let over = self.entries == 0 || Instant::now() >= self.until;
        self.cut |= over;
        over
    }

    /// A walk of at most `entries` entries.
    #[cfg(test)]
    pub(crate) fn of(blocking: &'a Blocking, entries: usize) -> Self {
        Self { entries, ..Self::new(blocking, Duration::from_secs(60)) }
    }

    /// The number of used entries.
    #[cfg(test)]
    pub(crate) fn read(&self) -> usize {
        ENTRIES - self.entries
    }

    /// The cgroups directly in `cgroup`, oldest first (the kernel numbers them in order), up to `most`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn children(&mut self, cgroup: &Path, most: usize) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(cgroup)?.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if found.len() == most || self.is_over() {
                self.cut = true;
                break;
            }
            self.entries -= 1;
            found.push((entry.ino(), entry.path()));
        }
        found.sort();
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }

    /// The processes in `cgroup` itself, as in `cgroup.procs`, up to `most`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn members(&mut self, cgroup: &Path, most: usize) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for line in BufReader::new(File::open(cgroup.join("cgroup.procs"))?).lines() {
            let line = line?;
            if found.len() == most || self.is_over() {
                self.cut = true;
                break;
            }
            self.entries -= 1;
            found.push(line);
        }
        Ok(found)
    }

    /// The QoS classes' cgroups in the pods' cgroup `root`.
    pub(crate) fn classes(&mut self, root: &Path) -> Vec<PathBuf> {
        let children = self.children(root, PODS).unwrap_or_default();
        children.into_iter().filter(|path| is_class(path)).collect()
    }

    /// The pods' cgroups: those in `root`, and in the QoS classes' cgroups there.
    pub(crate) fn pods(&mut self, root: &Path) -> Vec<PathBuf> {
        let children = self.children(root, PODS).unwrap_or_default();
        let (classes, mut pods): (Vec<_>, Vec<_>) =
            children.into_iter().partition(|path| is_class(path));
        for class in classes {
            pods.extend(self.children(&class, PODS).unwrap_or_default());
        }
        pods
    }
}

fn is_class(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(is_qos_class)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for path in paths {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        root
    }

    fn walk(blocking: &Blocking) -> Walk<'_> {
        Walk::new(blocking, Duration::from_secs(60))
    }

    #[test]
    fn pods_are_found_in_both_layouts_and_nothing_below_them_is_read() {
        let blocking = Blocking::here().unwrap();
        let root = tree(&["burstable/pod1/c/x/pod9", "kubepods-besteffort.slice/pod2/c", "pod3/c"]);
        let mut walk = walk(&blocking);
        let found = walk.pods(root.path());
        let mut names: Vec<_> = found.iter().filter_map(|path| path.file_name()).collect();
        names.sort();
        assert_eq!(names, ["pod1", "pod2", "pod3"]);
        assert_eq!(walk.read(), 5);
        assert!(!walk.is_cut());
    }

    #[test]
    fn a_listing_ends_at_its_limit_and_says_so() {
        let blocking = Blocking::here().unwrap();
        let names: Vec<String> = (0..100).map(|number| number.to_string()).collect();
        let root = tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
        fs::write(root.path().join("cgroup.procs"), "1\n2\n3\n").unwrap();
        let mut walk = walk(&blocking);
        assert_eq!(walk.children(root.path(), 100).unwrap().len(), 100);
        assert_eq!(walk.members(root.path(), 3).unwrap(), ["1", "2", "3"]);
        assert!(!walk.is_cut());
        assert_eq!(walk.children(root.path(), 10).unwrap().len(), 10);
        assert!(walk.is_cut());
        let mut walk = Walk { cut: false, ..walk };
        assert_eq!(walk.members(root.path(), 2).unwrap(), ["1", "2"]);
        assert!(walk.is_cut());
    }

    #[test]
    fn a_walk_whose_time_or_entries_are_used_up_reads_nothing_more() {
        let blocking = Blocking::here().unwrap();
        let root = tree(&["1", "2", "3"]);
        let mut late = Walk::new(&blocking, Duration::ZERO);
        assert!(late.children(root.path(), 10).unwrap().is_empty() && late.is_cut());
        let mut few = Walk::of(&blocking, 2);
        assert_eq!(few.children(root.path(), 10).unwrap().len(), 2);
        assert!(few.is_cut() && few.is_over());
    }
}
