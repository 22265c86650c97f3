//! Marks the cgroups that hold pods, and the agents' own pods, whose traffic is left alone and which may talk to each
//! other.

use std::{mem::replace, path::Path, time::Duration};

use aya::maps::{HashMap, Map, MapData};
use kiam_common::{CgroupMark, names::map::CGROUPS};
use tokio::time::sleep;
use tracing::warn;

use super::{config::check, loading::check_object, programs::map_error};
use crate::{
    error::Error,
    intercept::Config,
    pins::{self, locks::AgentLock},
    sys::{Cgroup, Walk, membership::Owner},
};
use kiam_core::blocking::{self, Blocking};

/// The longest search for the QoS classes' cgroups.
pub(super) const CLASSES_TIME: Duration = Duration::from_secs(2);
/// The time between two searches for the pods' cgroup that has a process, where there are several.
const UNUSED: Duration = Duration::from_millis(200);

/// As [`prepare`], off the runtime's threads, and again until there is a first pod where that shows which cgroup is the pods'.
///
/// # Errors
///
/// As [`prepare`].
pub async fn prepare_once_possible(config: &Config) -> Result<AgentLock, Error> {
    let mut waits = false;
    loop {
        let checked = config.clone();
        let prepared = blocking::spawn(move |token| prepare(token, &checked));
        match prepared.await.map_err(|_| Error::Panicked)? {
            Err(error @ Error::UnusedCgroups(_)) => {
                if !replace(&mut waits, true) {
                    warn!(%error, "Waiting for the first pod, which shows where the kubelet puts them");
                }
                sleep(UNUSED).await;
            }
            prepared => return prepared,
        }
    }
}

/// Checks the configuration, and marks the agent's own pod in the maps of a running agent, if there is one, which passes
/// its sockets only to marked pods. The returned lock blocks an uninstallation.
///
/// # Errors
///
/// Whatever is missing on this machine; see [`Error`].
pub fn prepare(blocking: &Blocking, config: &Config) -> Result<AgentLock, Error> {
    check_object()?;
    check(config)?;
    let cgroup = Cgroup::open(blocking, config.cgroup.as_deref())?;
    let classes = cgroup.qos_classes(&mut Walk::new(blocking, CLASSES_TIME));
    // The first call creates the folder. An uninstallation may have emptied it before the second call.
    pins::open(&config.bpffs)?;
    let mut agent_lock = AgentLock::share(&config.bpffs)?;
    let (pins, older) = pins::open(&config.bpffs)?;
    // If the lock waited for an uninstallation, the folder is a new one.
    agent_lock.follow()?;
    for map in older.iter().chain([&pins]).filter_map(|folder| marks(folder)) {
        mark_cgroups(map, &cgroup, &classes)?;
    }
    Ok(agent_lock)
}

/// Whether the process `pid` may receive the sockets: it runs in no pod, in a marked pod, or in the agent's own pod. In
/// doubt the answer is no.
#[must_use]
pub fn may_hand_over(blocking: &Blocking, config: &Config, pid: u32) -> bool {
    let Ok(cgroup) = Cgroup::open(blocking, config.cgroup.as_deref()) else { return false };
    let pod = match cgroup.owner(pid) {
        Owner::Host => return true,
        Owner::Unknown => return false,
        Owner::Pod(pod) => pod,
    };
    if cgroup.own_pod() == Some(pod) {
        return true;
    }
    let Ok((pins, _)) = pins::open(&config.bpffs) else { return false };
    marks(&pins).is_some_and(|marks| marks.get(&pod, 0).is_ok_and(|mark| CgroupMark::Pass.is(mark)))
}

/// Marks the pods' cgroup and its QoS classes, whose children are pods, and the agent's own pod, which keeps the real IMDS.
/// Removes the marks of cgroups that are gone. Another running agent keeps its mark until its pod is gone.
pub(super) fn mark_cgroups<M: std::borrow::BorrowMut<MapData>>(
    mut cgroups: HashMap<M, u64, u32>,
    cgroup: &Cgroup,
    classes: &[u64],
) -> Result<(), Error> {
    cgroups.insert(cgroup.id(), CgroupMark::Pods as u32, 0).map_err(map_error(CGROUPS))?;
    for class in classes {
        cgroups.insert(class, CgroupMark::QosClass as u32, 0).map_err(map_error(CGROUPS))?;
    }
    if let Some(own) = cgroup.own_pod() {
        cgroups.insert(own, CgroupMark::Pass as u32, 0).map_err(map_error(CGROUPS))?;
    }
    let gone = |id: &u64| {
        cgroup.path_of(*id).is_err_and(|error| error.raw_os_error() == Some(libc::ESTALE))
    };
    let stale: Vec<u64> = cgroups.keys().flatten().filter(gone).collect();
    for id in stale {
        // Another agent may have been faster.
        if let Err(error) = cgroups.remove(&id) {
            warn!(%error, "Removing the mark of a removed cgroup failed");
        }
    }
    Ok(())
}

/// The marks that are pinned in `folder`; `None` for an older layout with another format.
pub(super) fn marks(folder: &Path) -> Option<HashMap<MapData, u64, u32>> {
    let path = folder.join(CGROUPS);
    let map = path.exists().then(|| MapData::from_pin(path).ok()).flatten()?;
    HashMap::try_from(Map::from_map_data(map).ok()?).ok()
}
