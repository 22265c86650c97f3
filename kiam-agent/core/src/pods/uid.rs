//! Pod UIDs, and their spelling in cgroup paths.

use std::{ffi::OsStr, fmt, path::Path, str::FromStr, sync::Arc};

/// A pod's UID: `metadata.uid`, in lower case with dashes as the API writes it, or the 32 hex digits that
/// the kubelet gives a static pod (`kubernetes.io/config.hash` of its mirror pod).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Arc<str>);

/// Text that is neither a UID nor a config hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a pod UID: expected 8-4-4-4-12 hexadecimal digits, or the 32 of a static pod's config hash"
)]
pub struct InvalidPodUid(String);

// === impl PodUid ===

impl PodUid {
    /// A UID or config hash from trusted text. Text from outside is parsed instead.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.to_ascii_lowercase().into())
    }

    /// The pod in a cgroup's name: `pod<uid>` (cgroupfs driver), or
    /// `<prefix>-pod<uid>.slice` with underscores for dashes (systemd driver).
    #[must_use]
    pub fn from_cgroup_name(name: &str) -> Option<Self> {
        let uid = match name.strip_suffix(".slice") {
            Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid)?,
            None => name.strip_prefix("pod")?,
        };
        Self::from_digits(uid)
    }

    /// The pod of a cgroup path below the pods' cgroup, where the kubelet has it: first, or second after the cgroup of a
    /// QoS class. Deeper names prove nothing, since a container can create cgroups below its own, and neither do names
    /// below a cgroup that is not the kubelet's.
    #[must_use]
    pub fn from_cgroup_path(below: &Path) -> Option<Self> {
        let mut names = below.iter().map(OsStr::to_str);
        let first = names.next()??;
        Self::from_cgroup_name(if is_qos_class(first) { names.next()?? } else { first })
    }

    /// 8-4-4-4-12 hex digits joined by dashes or underscores, or 32 of them.
    fn from_digits(text: &str) -> Option<Self> {
        let dashed = text.replace('_', "-").to_ascii_lowercase();
        let groups: Vec<&str> = dashed.split('-').collect();
        let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
        let hex = groups.iter().all(|group| group.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let known = matches!(lengths.as_slice(), [8, 4, 4, 4, 12] | [32]);
        (hex && known).then(|| Self(dashed.into()))
    }
}

/// Whether a cgroup's name is that of a QoS class, of the cgroupfs driver or of systemd's, which puts all the parent
/// slices into a slice's name. Guaranteed pods are in none.
#[must_use]
pub fn is_qos_class(name: &str) -> bool {
    let classes = ["burstable", "besteffort"];
    match name.strip_suffix(".slice").and_then(|slice| slice.rsplit_once('-')) {
        Some((above, class)) => !above.is_empty() && classes.contains(&class),
        None => classes.contains(&name),
    }
}

impl FromStr for PodUid {
    type Err = InvalidPodUid;

    /// Reads any spelling that the API or a cgroup path has for a UID.
    fn from_str(text: &str) -> Result<Self, InvalidPodUid> {
        Self::from_digits(text).ok_or_else(|| InvalidPodUid(text.to_owned()))
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    const A: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
    const B: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";

    #[test]
    fn kubelets_layouts_name_their_pod() {
        let under = A.replace('-', "_");
        let hash = "5f6c3a1b2d4e5f60718293a4b5c6d7e8";
        let cases = [
            (
                format!(
                    "kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-1.scope"
                ),
                Some(A),
            ),
            (format!("kubepods-pod{under}.slice/crio-1.scope"), Some(A)),
            (
                format!(
                    "kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{under}.slice/x"
                ),
                Some(A),
            ),
            (format!("burstable/pod{A}/0123"), Some(A)),
            (format!("pod{A}/0123/docker/1"), Some(A)),
            (format!("besteffort/pod{hash}/0123"), Some(hash)),
            (format!("besteffort/pod{}/0123", A.to_uppercase()), Some(A)),
            // CRI-O, with its monitor and the container's own cgroup below the scope.
            (
                format!(
                    "kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/crio-conmon-1.scope"
                ),
                Some(A),
            ),
            (format!("kubepods-pod{under}.slice/crio-1.scope/container"), Some(A)),
            // Docker by cri-dockerd, both drivers.
            (
                format!(
                    "kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/docker-1.scope"
                ),
                Some(A),
            ),
            (format!("besteffort/pod{A}/docker/1"), Some(A)),
            // kind, below kubelet.slice; and systemd's escape in a container's name.
            (
                format!(
                    "kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{under}.slice/cri-containerd-1.scope/init.scope"
                ),
                Some(A),
            ),
            (format!("kubepods-pod{under}.slice/cri\\x2dcontainerd-1.scope"), Some(A)),
            // The pod's own cgroup, and one without a container's name.
            (format!("burstable/pod{A}"), Some(A)),
            ("kubepods-burstable.slice".to_owned(), None),
            ("besteffort/podium/0123".to_owned(), None),
            (format!("besteffort/pod{A}0/0123"), None),
            ("besteffort/pod/0123".to_owned(), None),
            (String::new(), None),
            // Escaped dashes are no dashes.
            (format!("kubepods\\x2dpod{under}.slice/1"), None),
            (format!("kubepods-pod{}.slice/1", under.replace('_', "\\x2d")), None),
        ];
        for (path, uid) in cases {
            let found = PodUid::from_cgroup_path(Path::new(&path));
            assert_eq!(found, uid.map(PodUid::new), "{path}");
        }
    }

    #[test]
    fn every_spelling_of_a_uid_is_the_same_uid_and_a_hash_with_its_digits_is_not() {
        let uid: PodUid = A.parse().unwrap();
        for text in [A.to_uppercase(), A.replace('-', "_")] {
            assert_eq!(text.parse(), Ok(uid.clone()));
        }
        let hash: PodUid = A.replace('-', "").parse().unwrap();
        assert_ne!(hash, uid);
        let dashes =
            ["--------------------------------", "", "0f8fad5b-d9cb-469f-a165-70867728950g"];
        for text in dashes.into_iter().chain([&A[1..], "０f8fad5bd9cb469fa16570867728950"]) {
            assert!(text.parse::<PodUid>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_pods_cgroup_may_be_nested_as_deep_as_a_node_is() {
        let under = A.replace('-', "_");
        let kind = "kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod";
        for (root, path) in [
            ("/kubepods.slice", format!("kubepods-pod{under}.slice/crio-1.scope")),
            ("/kubelet.slice/kubelet-kubepods.slice", format!("{kind}{under}.slice/1")),
            ("/system.slice/docker-1.scope/kubelet/kubepods", format!("burstable/pod{A}/1")),
            (
                "/system.slice/docker-1.scope/kubelet.slice/kubelet-kubepods.slice",
                format!("{kind}{under}.slice/1"),
            ),
            ("/k3s/kubepods", format!("besteffort/pod{A}/1")),
            ("/docker/1/kubepods", format!("pod{A}/1")),
        ] {
            let whole = format!("{root}/{path}");
            let below = Path::new(&whole).strip_prefix(root).unwrap();
            assert_eq!(PodUid::from_cgroup_path(below), Some(PodUid::new(A)), "{whole}");
            // A root that is not the pods' own names nobody.
            let above = Path::new(&whole).strip_prefix("/").unwrap();
            assert_eq!(PodUid::from_cgroup_path(above), None, "{whole}");
        }
    }

    #[test]
    fn a_pods_name_counts_at_the_kubelets_depth_only() {
        let under = A.replace('-', "_");
        for above in [
            "system.slice",
            "burstable/burstable",
            "burstable/besteffort",
            "kubepods-burstable.slice/burstable",
            "burstable/0123",
            "podium",
            "-burstable.slice",
            "burstable.slice",
            "Burstable",
            "guaranteed",
            "kubepods",
            "kubelet/kubepods",
            "\u{1b}[2J",
        ] {
            for pod in [format!("pod{A}"), format!("kubepods-burstable-pod{under}.slice")] {
                let path = format!("{above}/{pod}/0123");
                assert_eq!(PodUid::from_cgroup_path(Path::new(&path)), None, "{path}");
            }
        }
        let bytes = OsStr::from_bytes(b"burstable\xff/pod").to_owned();
        assert_eq!(PodUid::from_cgroup_path(Path::new(&bytes)), None);
    }

    #[test]
    fn cgroups_that_a_container_made_are_not_believed() {
        let victim = format!("pod{B}");
        let systemd = format!("kubepods-pod{}.slice", B.replace('-', "_"));
        for inner in [victim, systemd, "\u{1b}[2J'\"".to_owned(), "x".repeat(5000)] {
            let path = format!("burstable/pod{A}/0123/{inner}/0123");
            assert_eq!(PodUid::from_cgroup_path(Path::new(&path)), Some(PodUid::new(A)), "{path}");
        }
    }
}
