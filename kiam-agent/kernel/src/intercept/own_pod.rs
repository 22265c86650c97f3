//! The cgroups that the programs know: those that hold pods, and the agents' own pods, whose traffic is left alone,
//! and which may speak with each other.

use std::{path::Path, time::Duration};

use aya::maps::{HashMap, Map, MapData};
use kiam_common::{CGROUP_PASS, CGROUP_PODS, CGROUP_QOS_CLASS};
use tracing::warn;

use super::{config::check, programs::map_error};
use crate::{
    error::Error,
    intercept::Config,
    pins::{self, locks::AgentLock},
    sys::{Cgroup, Walk, membership::Owner},
};
use kiam_core::blocking::Blocking;

const CGROUPS: &str = "CGROUPS";
/// How long the QoS classes' cgroups are looked for.
pub(super) const CLASSES_TIME: Duration = Duration::from_secs(2);

/// Checks what can be checked before there is a listener, and marks the agent's own pod in the maps of an agent
/// that runs, if one does: that one is asked for its sockets, and answers no other pod. From then on nobody uninstalls.
///
/// # Errors
///
/// Whatever is missing on this machine; see [`Error`].
pub fn prepare(blocking: &Blocking, config: &Config) -> Result<AgentLock, Error> {
    check(config)?;
    let cgroup = Cgroup::open(blocking, config.cgroup.as_deref())?;
    let classes = cgroup.qos_classes(&mut Walk::new(blocking, CLASSES_TIME));
    // The folder is made by the first, and its content may have been taken away before the second.
    pins::open(&config.bpffs)?;
    let mut agent_lock = AgentLock::share(&config.bpffs)?;
    let (pins, older) = pins::open(&config.bpffs)?;
    // An uninstallation that was waited for has removed the folder, and this made another.
    agent_lock.follow()?;
    for map in older.iter().chain([&pins]).filter_map(|folder| marks(folder)) {
        mark_cgroups(map, &cgroup, &classes)?;
    }
    Ok(agent_lock)
}

/// Whether process `pid` is an agent's or the host's: it runs in no pod, or in one that is marked, or in ours. A process of
/// which that can't be told is neither.
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
    marks(&pins).is_some_and(|marks| marks.get(&pod, 0).is_ok_and(|mark| mark == CGROUP_PASS))
}

/// Marks the pods' cgroup and its QoS classes, whose children are pods, and the agent's own pod, which keeps the real
/// IMDS. Entries of cgroups that are gone go; the agent that runs beside this one keeps its own until its pod is gone.
pub(super) fn mark_cgroups<M: std::borrow::BorrowMut<MapData>>(
    mut cgroups: HashMap<M, u64, u32>,
    cgroup: &Cgroup,
    classes: &[u64],
) -> Result<(), Error> {
    cgroups.insert(cgroup.id(), CGROUP_PODS, 0).map_err(map_error(CGROUPS))?;
    for class in classes {
        cgroups.insert(class, CGROUP_QOS_CLASS, 0).map_err(map_error(CGROUPS))?;
    }
    if let Some(own) = cgroup.own_pod() {
        cgroups.insert(own, CGROUP_PASS, 0).map_err(map_error(CGROUPS))?;
    }
    let gone = |id: &u64| {
        cgroup.path_of(*id).is_err_and(|error| error.raw_os_error() == Some(libc::ESTALE))
    };
    let stale: Vec<u64> = cgroups.keys().flatten().filter(gone).collect();
    for id in stale {
        // Another agent may have been faster.
        if let Err(error) = cgroups.remove(&id) {
            warn!(%error, "Entry of a cgroup that is gone not removed");
        }
    }
    Ok(())
}

/// The marked cgroups that are pinned in `folder`; an older layout may have them in another form.
pub(super) fn marks(folder: &Path) -> Option<HashMap<MapData, u64, u32>> {
    let path = folder.join(CGROUPS);
    let map = path.exists().then(|| MapData::from_pin(path).ok()).flatten()?;
    HashMap::try_from(Map::from_map_data(map).ok()?).ok()
}
