//! The pods' cgroup, to which the programs are attached, and the agent's own cgroup in it.

use std::{
    ffi::c_int,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tracing::warn;

use super::{membership, membership::Membership, membership::Owner, walk::Walk};
use crate::error::Error;
use kiam_core::blocking::Blocking;

/// The depth of the search for the kubelet's root below a mount (kind nests it in a container's scope).
const SEARCH_DEPTH: usize = 4;
/// The most children of a searched cgroup.
const SEARCH_WIDTH: usize = 4096;
/// The longest search for the pods' cgroup and the agent's own.
const SEARCH_TIME: Duration = Duration::from_secs(2);

/// `FILEID_KERNFS` of `linux/exportfs.h`: the handle is the 64-bit id. Kernel 5.5.
const FILEID_KERNFS: c_int = 0xfe;

/// An open cgroup, to which the programs are attached. Clones share the directory.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: Arc<File>,
    id: u64,
    membership: Membership,
}

/// `struct file_handle` with the kernfs id as its handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: c_int,
    id: [u8; 8],
}

// === impl Cgroup ===

impl Cgroup {
    /// Opens `given`, or the only cgroup in use that matches a kubelet's layout, and finds the agent's own cgroup.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`], [`Error::NoCgroup`], [`Error::SeveralCgroups`], [`Error::UnusedCgroups`] or [`Error::MixedCgroups`].
    pub fn open(blocking: &Blocking, given: Option<&Path>) -> Result<Self, Error> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let controllers = fs::read_to_string("/proc/cgroups").unwrap_or_default();
        let mut walk = Walk::new(blocking, SEARCH_TIME);
        let mounts = [mounts("cgroup2"), mounts("cgroup")];
        let path = locate(&mut walk, given, &mounts, (&release, &controllers))?;
        let mut cgroup = Self::at(&path)?;
        cgroup.membership = Membership::find(&mut walk, &cgroup);
        if walk.is_cut() {
            warn!(
                "There are too many cgroups to find the pods' cgroup and the agent's own; name the pods' cgroup with --cgroup"
            );
        }
        Ok(cgroup)
    }

    fn at(path: &Path) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Cgroup { path: path.to_owned(), problem };
        if !path.is_absolute() {
            return Err(wrong("the path is not absolute".to_owned()));
        }
        let path = fs::canonicalize(path).map_err(|error| wrong(error.to_string()))?;
        let directory = File::open(&path).map_err(|error| wrong(error.to_string()))?;
        let metadata = directory.metadata().map_err(|error| wrong(error.to_string()))?;
        if !metadata.is_dir() {
            return Err(wrong("it is not a directory".to_owned()));
        }
        let system = rustix::fs::fstatfs(&directory).map_err(|error| wrong(error.to_string()))?;
        if u64::try_from(system.f_type).ok() != Some(0x6367_7270) {
            return Err(wrong("it is not on a cgroup2 file system".to_owned()));
        }
        let (directory, membership) = (Arc::new(directory), Membership::default());
        Ok(Self { path, directory, id: metadata.ino(), membership })
    }

    /// The cgroup's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cgroup's id for BPF: the inode number.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The open directory.
    #[must_use]
    pub fn directory(&self) -> &File {
        &self.directory
    }

    /// The agent's own cgroup, if it is this one or below.
    pub(crate) fn own(&self) -> Option<&Path> {
        self.membership.own(&self.path)
    }

    /// The id of the cgroup of the agent's own pod, if it runs in one.
    #[must_use]
    pub fn own_pod(&self) -> Option<u64> {
        membership::pod(&self.path, self.own()?.strip_prefix(&self.path).ok()?)
    }

    /// The owner of the process `pid`.
    pub(crate) fn owner(&self, pid: u32) -> Owner {
        self.membership.owner(&self.path, pid)
    }

    /// Whether the path still leads to this cgroup. Otherwise it was removed, and maybe recreated.
    #[must_use]
    pub fn is_there(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.id)
    }

    /// Other cgroups in use that match a kubelet's layout.
    pub(crate) fn others(&self, walk: &mut Walk<'_>) -> Vec<PathBuf> {
        let mut others = found(walk, &mounts("cgroup2"));
        // The same one may be at several mounts.
        let is_another = |path: &PathBuf| {
            fs::metadata(path).is_ok_and(|metadata| metadata.ino() != self.id)
                && has_processes(path)
        };
        others.retain(is_another);
        others
    }

    /// The ids of the current QoS classes' cgroups, ascending.
    pub(crate) fn qos_classes(&self, walk: &mut Walk<'_>) -> Vec<u64> {
        let classes = walk.classes(&self.path).into_iter();
        let mut ids: Vec<u64> =
            classes.filter_map(|path| fs::metadata(path).ok()).map(|class| class.ino()).collect();
        ids.sort_unstable();
        ids
    }

    /// The path of the cgroup `id` of the same mount, without walking: the id is its file handle. Needs
    /// CAP_DAC_READ_SEARCH.
    ///
    /// # Errors
    ///
    /// The system's; `ESTALE` after the cgroup was removed.
    pub fn path_of(&self, id: u64) -> io::Result<PathBuf> {
        let mut handle = Handle { bytes: 8, kind: FILEID_KERNFS, id: id.to_ne_bytes() };
        // SAFETY: the descriptor is open, and `handle` is laid out as `struct file_handle` with 8 bytes.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                self.directory.as_raw_fd(),
                &raw mut handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
    }
}

/// Whether sockets may lose their v2 cgroup. Before kernel 5.15 one word of a socket was either its v2 cgroup or its
/// net_cls and net_prio marks, and the first use of a mark changed this for every later socket. Such a socket counts as
/// the root's, and hooks at the pods' cgroup do not run for it. `controllers` is `/proc/cgroups`, where
/// a hierarchy other than 0 is a v1 one. An unreadable release counts as an old one.
fn hides_sockets(release: &str, controllers: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = (numbers.next().and_then(Result::ok), numbers.next().and_then(Result::ok));
    version < (Some(5), Some(15))
        && controllers.lines().any(|line| {
            let mut columns = line.split_ascii_whitespace();
            matches!(columns.next(), Some("net_cls" | "net_prio"))
                && columns.next().is_some_and(|hierarchy| hierarchy != "0")
        })
}

fn is_root(name: &str) -> bool {
    name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice")
}

/// The mount points of one file system type.
pub(crate) fn mounts(kind: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let columns = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    columns.filter(|row| row.get(2) == Some(&kind)).map(|row| PathBuf::from(row[1])).collect()
}

/// Finds every directory with a name that kubelets give to the root of pods.
fn found(walk: &mut Walk<'_>, mounts: &[PathBuf]) -> Vec<PathBuf> {
    let mut matches = Vec::new();
    for mount in mounts {
        search(walk, mount, SEARCH_DEPTH, &mut matches);
    }
    matches.sort();
    matches.dedup();
    matches
}

/// Searches `folder`, but not below a match, where cgroups are pods'.
fn search(walk: &mut Walk<'_>, folder: &Path, depth: usize, matches: &mut Vec<PathBuf>) {
    for path in walk.children(folder, SEARCH_WIDTH).unwrap_or_default() {
        if path.file_name().and_then(|name| name.to_str()).is_some_and(is_root) {
            matches.push(path);
        } else if depth > 1 {
            search(walk, &path, depth - 1, matches);
        }
    }
}

/// Whether a kubelet uses `root`: after a change of its cgroup driver the old root stays. An unreadable one counts as in
/// use.
fn has_processes(root: &Path) -> bool {
    let events = fs::read_to_string(root.join("cgroup.events"));
    events.map_or(true, |events| !events.lines().any(|line| line == "populated 0"))
}

/// Finds the pods' cgroup on the mounts of cgroup v2 and v1. Only for one on v2 it reports that v1 hides sockets: pods on
/// v1 have another remedy, which solves both.
fn locate(
    walk: &mut Walk<'_>,
    given: Option<&Path>,
    [v2, v1]: &[Vec<PathBuf>; 2],
    (release, controllers): (&str, &str),
) -> Result<PathBuf, Error> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let matches = found(walk, v2);
            only_match(walk, matches, v1)?
        }
    };
    if hides_sockets(release, controllers) {
        return Err(Error::MixedCgroups { release: release.trim().to_owned() });
    }
    Ok(path)
}

fn only_match(
    walk: &mut Walk<'_>,
    mut matches: Vec<PathBuf>,
    v1: &[PathBuf],
) -> Result<PathBuf, Error> {
    if matches.len() > 1 {
        let (used, unused): (Vec<_>, Vec<_>) =
            matches.into_iter().partition(|root| has_processes(root));
        if used.is_empty() {
            return Err(Error::UnusedCgroups(unused));
        }
        matches = used;
    }
    match (matches.pop(), matches.is_empty()) {
        // Programs that are attached there would see no pod.
        (Some(only), true) if !has_processes(&only) && has_pods(walk, v1) => {
            Err(Error::NoCgroup { hint: ", only an empty one, and pods on a cgroup v1 mount" })
        }
        (Some(only), true) => Ok(only),
        (Some(last), false) => {
            matches.push(last);
            Err(Error::SeveralCgroups(matches))
        }
        (None, _) if !found(walk, v1).is_empty() => {
            Err(Error::NoCgroup { hint: ", only on a cgroup v1 mount" })
        }
        (None, _) => Err(Error::NoCgroup { hint: "" }),
    }
}

fn has_pods(walk: &mut Walk<'_>, v1: &[PathBuf]) -> bool {
    found(walk, v1).iter().any(|root| !walk.pods(root).is_empty())
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
    fn kubelets_layouts_are_found_and_nothing_below_them() {
        let cases: [(&[&str], &str); 4] = [
            (&["kubepods.slice/kubepods-burstable.slice", "system.slice"], "kubepods.slice"),
            (&["kubepods/burstable/kubepods"], "kubepods"),
            (&["kubelet.slice/kubelet-kubepods.slice"], "kubelet.slice/kubelet-kubepods.slice"),
            (
                &["system.slice/docker-1.scope/kubelet/kubepods"],
                "system.slice/docker-1.scope/kubelet/kubepods",
            ),
        ];
        let blocking = Blocking::here().unwrap();
        for (paths, expected) in cases {
            let root = tree(paths);
            let matches = found(&mut walk(&blocking), &[root.path().to_owned()]);
            assert_eq!(matches, [root.path().join(expected)]);
        }
    }

    #[test]
    fn several_or_no_match_is_an_error_that_says_what_to_do() {
        let root = tree(&["kubepods", "a/b-kubepods.slice"]);
        let (blocking, mount) = (Blocking::here().unwrap(), [root.path().to_owned()]);
        let mut walk = walk(&blocking);
        let matches = found(&mut walk, &mount);
        let error = only_match(&mut walk, matches, &[]).unwrap_err().to_string();
        assert!(error.contains("--cgroup") && error.contains("b-kubepods.slice"), "{error}");
        let error = only_match(&mut walk, vec![], &mount).unwrap_err().to_string();
        assert!(error.contains("only on a cgroup v1 mount"), "{error}");
    }

    #[test]
    fn a_root_without_processes_does_not_count_while_another_has_some() {
        let (old, new) = ("kubepods", "kubepods.slice");
        let root = tree(&[old, new, "a-kubepods.slice"]);
        let (blocking, mount) = (Blocking::here().unwrap(), [root.path().to_owned()]);
        let mut walk = walk(&blocking);
        let mut chosen = |used: &[&str]| {
            for name in [old, new, "a-kubepods.slice"] {
                let populated = u8::from(used.contains(&name));
                let events = format!("populated {populated}\nfrozen 0\n");
                fs::write(root.path().join(name).join("cgroup.events"), events).unwrap();
            }
            let matches = found(&mut walk, &mount);
            only_match(&mut walk, matches, &[])
        };
        for used in [old, new] {
            assert_eq!(chosen(&[used]).unwrap(), root.path().join(used));
        }
        let error = chosen(&[old, new]).unwrap_err();
        let Error::SeveralCgroups(listed) = error else { panic!("{error}") };
        assert_eq!(listed, [old, new].map(|name| root.path().join(name)));
        let error = chosen(&[]).unwrap_err();
        let Error::UnusedCgroups(listed) = error else { panic!("{error}") };
        assert_eq!(listed.len(), 3);
    }

    #[test]
    fn a_node_whose_pods_are_on_v1_is_told_so_at_once() {
        let [pods, empty] = [tree(&["kubepods/burstable/pod1"]), tree(&["kubepods"])];
        let events = empty.path().join("kubepods/cgroup.events");
        let (blocking, marks) = (Blocking::here().unwrap(), "net_cls\t3\t1\t1\n");
        let [pods, empty] = [pods, empty].map(|tree| vec![tree.keep()]);
        let cases = [
            // Pods in v1, without v2, or with a cgroup of v2 that no pod is in.
            (vec![], "populated 0\n", "on a cgroup v1 mount"),
            (empty.clone(), "populated 0\n", "only an empty one"),
            // Pods in v2, on a kernel where v1 hides their sockets.
            (empty.clone(), "populated 1\n", "cgroup_no_v1=net_cls,net_prio"),
        ];
        for (v2, populated, expected) in cases {
            fs::write(&events, populated).unwrap();
            let kernel = ("5.10.0-46-cloud-amd64\n", marks);
            let located = locate(&mut walk(&blocking), None, &[v2, pods.clone()], kernel);
            let error = located.unwrap_err().to_string();
            let unified = error.contains("systemd.unified_cgroup_hierarchy=1");
            assert!(error.contains(expected), "{error}");
            assert_eq!(unified, !expected.contains("net_cls"), "{error}");
        }
        fs::write(&events, "populated 0\n").unwrap();
        let kernel = ("6.1.0\n", marks);
        let located = locate(&mut walk(&blocking), None, &[empty.clone(), empty.clone()], kernel);
        assert_eq!(located.unwrap(), empty[0].join("kubepods"), "no pod is anywhere yet");
        for folder in [pods, empty].concat() {
            fs::remove_dir_all(folder).unwrap();
        }
    }

    #[test]
    fn v1_marks_hide_sockets_on_old_kernels_only() {
        let v1 = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t3\t1\t1\nnet_prio\t9\t1\t1\n";
        let v2 =
            "#subsys_name\thierarchy\tnum_cgroups\tenabled\nnet_cls\t0\t1\t1\nnet_prio\t0\t1\t1\n";
        let cases = [
            ("5.10.0-30-cloud-amd64", v1, true),
            ("5.14.21", v1, true),
            ("5.15.0-1051-aws", v1, false),
            ("6.18.3", v1, false),
            ("10.0.1", v1, false),
            ("5.10.0", v2, false),
            ("", v1, true),
        ];
        for (release, controllers, expected) in cases {
            assert_eq!(hides_sockets(release, controllers), expected, "{release:?}");
        }
    }

    #[test]
    fn given_path_that_is_no_cgroup_is_refused_by_name() {
        let blocking = Blocking::here().unwrap();
        let error = Cgroup::open(&blocking, Some(Path::new("kubepods"))).unwrap_err().to_string();
        assert!(error.contains("\"kubepods\"") && error.contains("not absolute"), "{error}");
        let error = Cgroup::open(&blocking, Some(Path::new("/tmp"))).unwrap_err().to_string();
        assert!(error.contains("not on a cgroup2"), "{error}");
    }
}
