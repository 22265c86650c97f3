//! One scan of a pod: finds the network namespaces of its processes, and opens pod listeners in them.

use std::{collections::HashSet, net::IpAddr, path::PathBuf};

use super::{
    NAMESPACES, NoListenerReason,
    claims::{Claim, Claims},
    listen::{self, VerifiedNamespace},
    processes::{self, Processes},
};
use kiam_core::pods::PodUid;

/// A network namespace that is claimed for a pod.
#[derive(Debug)]
pub(super) struct ClaimedNamespace {
    pub(super) claim: Claim,
    pub(super) cookie: u64,
    /// The port of the pod listeners, or why there are none.
    pub(super) listening: Result<u16, NoListenerReason>,
    /// The pod's addresses at the last time when one of them was found in the namespace; empty before they were known.
    pub(super) proven_by: Vec<IpAddr>,
}

/// The input of a scan, which owns the pod's namespaces meanwhile.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) pod: PodUid,
    pub(super) cgroup: PathBuf,
    pub(super) held: Vec<ClaimedNamespace>,
    /// The pod's addresses in the API, if it is known.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether to scan only as much as a new sandbox has.
    pub(super) urgent: bool,
    /// Whether to open pod listeners.
    pub(super) listens: bool,
    pub(super) claims: Claims,
}

/// The result of a scan.
#[derive(Debug)]
pub(super) struct ScanResult {
    /// The pod's namespaces, earlier and new ones.
    pub(super) held: Vec<ClaimedNamespace>,
    /// The new namespaces among them, and those with new listeners.
    pub(super) opened: Vec<VerifiedNamespace>,
    /// The namespaces that are no longer the pod's.
    pub(super) closed: Vec<ClaimedNamespace>,
    /// Why there are no namespaces, if there are none.
    pub(super) reason: NoListenerReason,
    /// Whether the pod has processes.
    pub(super) any: bool,
    /// Whether a namespace was claimed and released again. Another pod may have failed to claim it meanwhile.
    pub(super) released: bool,
    /// Whether another scan in a moment may find more.
    pub(super) unsettled: bool,
}

// === impl Scan ===

impl Scan {
    /// Runs the scan. Blocks.
    pub(super) fn run(self) -> ScanResult {
        let Self { pod, cgroup, held, addresses, urgent, listens, claims } = self;
        let claimed: HashSet<u64> = held.iter().map(|held| held.claim.inode()).collect();
        let most = if urgent { processes::FEW } else { processes::MANY };
        let processes = Processes::of(&cgroup, most, &claimed, &claims);
        let mut found = ScanResult {
            held: Vec::new(),
            opened: Vec::new(),
            closed: Vec::new(),
            reason: processes.reason(),
            any: processes.any,
            released: false,
            unsettled: !processes.complete || processes.on_node,
        };
        for held in held {
            let seen = processes.complete && !processes.unreached;
            let lives = !seen || processes.lived_in.contains(&held.claim.inode());
            found.keep(held, lives, &addresses);
        }
        for (inode, namespace) in processes.others {
            // A nested namespace is the pod's only if an address says so.
            if found.held.len() >= if addresses.is_empty() { 1 } else { NAMESPACES } {
                break;
            }
            match claims.claim(inode, namespace, &pod) {
                Ok(claim) => match listen::open(claim.namespace(), &addresses, &claims, listens) {
                    Ok(open) => found.add(open, claim, &addresses),
                    Err(reason) => found.release(claim, reason),
                },
                Err(owner) => found.reason = NoListenerReason::AnotherPods(owner),
            }
        }
        // The runtime and its monitor stay on the node's network.
        found.unsettled &= !found.held.iter().any(ClaimedNamespace::is_settled);
        found
    }
}

// === impl ClaimedNamespace ===

impl ClaimedNamespace {
    /// Whether the namespace is complete. While `lo` is down, the runtime may be about to set it up.
    fn is_settled(&self) -> bool {
        self.listening != Err(NoListenerReason::LoopbackDown)
    }
}

// === impl ScanResult ===

impl ScanResult {
    /// The result of a scan that panicked, which loses the pod's namespaces.
    pub(super) fn panicked() -> Self {
        Self {
            held: Vec::new(),
            opened: Vec::new(),
            closed: Vec::new(),
            reason: NoListenerReason::Failed { call: "scan", error: "it panicked".to_owned() },
            any: false,
            released: true,
            unsettled: true,
        }
    }

    fn keep(&mut self, mut held: ClaimedNamespace, lives: bool, addresses: &[IpAddr]) {
        if lives && held.proven_by != addresses && !addresses.is_empty() {
            match listen::has_one(held.claim.namespace(), addresses) {
                Ok(true) => held.proven_by = addresses.to_vec(),
                Ok(false) => {
                    self.reason = NoListenerReason::NoAddress;
                    return self.closed.push(held);
                }
                Err(reason) => {
                    // The check failed, so the namespace is kept.
                    self.unsettled = true;
                    self.reason = reason;
                }
            }
        }
        if !lives {
            return self.closed.push(held);
        }
        if let Err(reason) = &mut held.listening
            && *reason != NoListenerReason::NodePath
        {
            match listen::listen_in(held.claim.namespace()) {
                Ok(listening) => {
                    held.listening = Ok(listening.port);
                    self.opened
                        .push(VerifiedNamespace { cookie: held.cookie, listening: Ok(listening) });
                }
                Err(failure) => *reason = failure,
            }
        }
        self.unsettled |= !held.is_settled();
        self.held.push(held);
    }

    fn add(&mut self, open: VerifiedNamespace, claim: Claim, addresses: &[IpAddr]) {
        let listening = match &open.listening {
            Ok(listening) => Ok(listening.port),
            Err(reason) => Err(reason.clone()),
        };
        let held = ClaimedNamespace {
            claim,
            cookie: open.cookie,
            listening,
            proven_by: addresses.to_vec(),
        };
        self.unsettled |= !held.is_settled();
        self.held.push(held);
        self.opened.push(open);
    }

    fn release(&mut self, claim: Claim, reason: NoListenerReason) {
        drop(claim);
        self.released = true;
        // The runtime may be about to set up the namespace.
        self.unsettled |=
            matches!(reason, NoListenerReason::LoopbackDown | NoListenerReason::NoAddress);
        self.reason = reason;
    }
}

// === impl Processes ===

impl Processes {
    /// Why a pod with these processes has no network namespace.
    fn reason(&self) -> NoListenerReason {
        match &self.failure {
            Some(error) => {
                NoListenerReason::Failed { call: "open /proc/<pid>/ns/net", error: error.clone() }
            }
            None if self.on_node => NoListenerReason::NodesNamespace,
            None if self.hidden => NoListenerReason::Hidden,
            None => NoListenerReason::NoProcess,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    /// A look at a pod that holds a namespace which is not this process's, with `processes` in its cgroup.
    fn scan(processes: &str) -> ScanResult {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join("cgroup.procs"), processes).unwrap();
        scan_of(&cgroup)
    }

    fn scan_of(cgroup: &tempfile::TempDir) -> ScanResult {
        let claims = Claims::new(Vec::new()).unwrap();
        let pod = PodUid::new("a");
        let claim = claims.claim(7, File::open("/dev/null").unwrap(), &pod).unwrap();
        let held = vec![ClaimedNamespace {
            claim,
            cookie: 7,
            listening: Ok(61000),
            proven_by: Vec::new(),
        }];
        let (cgroup, addresses) = (cgroup.path().to_owned(), Vec::new());
        Scan { pod, cgroup, held, addresses, urgent: false, listens: true, claims }.run()
    }

    #[test]
    fn a_namespace_is_given_up_only_when_every_process_was_seen_elsewhere() {
        let own = std::process::id();
        for (processes, kept) in [
            (String::new(), 0),
            (format!("{own}\n"), 0),
            // Ended since, or out of sight: it may have been there, and have left others.
            ("99999999\n".to_owned(), 1),
            (format!("{own}\n99999999\n"), 1),
            ("0\n".to_owned(), 1),
        ] {
            let found = scan(&processes);
            assert_eq!((found.held.len(), found.closed.len()), (kept, 1 - kept), "{processes:?}");
        }
    }

    #[test]
    fn a_namespace_is_kept_while_the_kernel_says_that_the_pod_has_processes_elsewhere() {
        let own = format!("{}\n", std::process::id());
        // What the pod's cgroup lists, and how a deeper one than is searched, and the pod's own, are.
        for (processes, deep, pod, kept) in [
            ("", "populated 1\nfrozen 0\n", "populated 1\nfrozen 0\n", 1),
            (&own, "populated 1\nfrozen 0\n", "populated 1\nfrozen 0\n", 1),
            // Read while the process moved from a cgroup to another.
            ("", "populated 0\nfrozen 0\n", "populated 1\nfrozen 0\n", 1),
            (&own, "populated 0\nfrozen 0\n", "populated 1\nfrozen 0\n", 0),
            ("", "populated 0\nfrozen 0\n", "populated 0\nfrozen 0\n", 0),
        ] {
            let cgroup = tempfile::tempdir().unwrap();
            let deepest = cgroup.path().join("1/2/3/4");
            fs::create_dir_all(&deepest).unwrap();
            for (folder, processes, events) in
                [(cgroup.path(), processes, pod), (&deepest, own.as_str(), deep)]
            {
                fs::write(folder.join("cgroup.procs"), processes).unwrap();
                fs::write(folder.join("cgroup.events"), events).unwrap();
            }
            for between in ["1", "1/2", "1/2/3"] {
                fs::write(cgroup.path().join(between).join("cgroup.procs"), "").unwrap();
            }
            let found = scan_of(&cgroup);
            let (held, closed) = (found.held.len(), found.closed.len());
            assert_eq!((held, closed), (kept, 1 - kept), "{processes:?} {deep:?} {pod:?}");
        }
    }
}
