//! Watches of `cgroup.events`, which rest after each event.

use std::{ffi::OsStr, path::Path, time::Duration};

use rustix::fs::inotify::WatchFlags;
use tokio::time::Instant;

use super::{Change, Watch, WatchTarget};
use kiam_core::pods::PodUid;

/// The rest of a `cgroup.events` after an event, longer if others of the pod rest. Changes meanwhile are found after the
/// rest.
pub(super) const REST: Duration = Duration::from_millis(200);

/// A watch that has had its event.
#[derive(Debug)]
pub(super) struct Spent {
    pub(super) watch: i32,
    pub(super) pod: PodUid,
    pub(super) container: Option<Box<OsStr>>,
    pub(super) rests_until: Instant,
}

// === impl Watch ===

impl Watch {
    /// Records a watch that has had its event.
    pub(super) fn spend(&mut self, watch: i32, pod: PodUid, container: Option<Box<OsStr>>) {
        let Some(known) = self.pods.get_mut(&pod) else { return };
        // Events of the pod's other watches meanwhile cause a scan too.
        let rests_until = known.rest_until.max(Instant::now()) + REST;
        known.rest_until = rests_until;
        let place = self.spent.partition_point(|spent| spent.rests_until <= rests_until);
        self.spent.insert(place, Spent { watch, pod, container, rests_until });
    }

    /// Renews the watches whose rest is over, and has their pods scanned for changes meanwhile.
    pub(super) fn renew(&mut self, now: Instant, changes: &mut Vec<Change>) {
        while let Some(spent) = self.spent.pop_front_if(|spent| spent.rests_until <= now) {
            let Some(pod) = self.pods.get(&spent.pod) else { continue };
            let (path, watches) = match &spent.container {
                None => (pod.path.clone(), Some(&pod.watches)),
                Some(name) => (pod.path.join(&**name), pod.containers.get(name)),
            };
            // Otherwise the cgroup is gone, or is watched again already.
            if !watches.is_some_and(|watches| watches.contains(&spent.watch)) {
                continue;
            }
            let watch = self.watch_events(&path, &spent.pod, spent.container.clone());
            let Some(pod) = self.pods.get_mut(&spent.pod) else { continue };
            let watches = match &spent.container {
                None => Some(&mut pod.watches),
                Some(name) => pod.containers.get_mut(name),
            };
            if let Some(watches) = watches {
                watches.retain(|known| *known != spent.watch);
                watches.extend(watch);
            }
            let stirred = Change::Members(spent.pod);
            if !changes.contains(&stirred) {
                changes.push(stirred);
            }
        }
    }

    /// Watches the `cgroup.events` in `cgroup` for one event.
    pub(super) fn watch_events(
        &mut self,
        cgroup: &Path,
        pod: &PodUid,
        container: Option<Box<OsStr>>,
    ) -> Option<i32> {
        let place = WatchTarget::Events(pod.clone(), container);
        let flags = WatchFlags::MODIFY | WatchFlags::ONESHOT;
        self.watches.add(&cgroup.join("cgroup.events"), flags, place)
    }
}
