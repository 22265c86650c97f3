//! What the fleet asks of the Kubernetes API, by arithmetic.

use crate::{fleet::Fleet, scenario::CHURN};

/// Kinds that are watched: this node's pods, and all namespaces.
const KINDS: f64 = 2.0;
/// Mean seconds that a watch is kept, of 300 to 600.
const WATCH: f64 = 450.0;
/// Seconds between two bookmarks of a watch.
const BOOKMARK: f64 = 60.0;
/// Seconds of silence after which what is watched is listed, however long `--sync-interval` is.
const SILENCE: f64 = 75.0;
/// Seconds without news after which `--identity=source-ip` lists pods.
const PROOF: f64 = 60.0;
/// Bytes of a bookmark, which is nearly nothing but its version.
const BOOKMARK_BYTES: f64 = 250.0;

/// How large objects are. Assumed; the agent does not decide it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// JSON of a whole pod, with `managedFields`.
    pub(crate) pod_bytes: f64,
    /// JSON of a namespace's metadata.
    pub(crate) namespace_bytes: f64,
    pub(crate) namespaces: f64,
    /// Changes of a pod that its node's agent is shown from its binding to its end.
    pub(crate) events_a_pod: f64,
    /// Changes of namespaces an hour, in the whole cluster.
    pub(crate) namespace_changes: f64,
}

/// Requests and bytes a second, of the whole fleet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) sizes: Sizes,
    pub(crate) watches: f64,
    pub(crate) opened: f64,
    pub(crate) bookmarks: f64,
    pub(crate) bookmark_bytes: f64,
    pub(crate) pod_events: f64,
    pub(crate) pod_event_bytes: f64,
    pub(crate) namespace_events: f64,
    pub(crate) namespace_event_bytes: f64,
    /// Reads of etcd's version, one for each list of pods by the default of `--sync-interval`.
    pub(crate) proofs: f64,
    /// The same by source addresses while no pod changes.
    pub(crate) silence_proofs: f64,
    /// Lists of namespaces while none changes.
    pub(crate) silence_lists: f64,
    pub(crate) silence_list_bytes: f64,
    nodes: f64,
    pods: f64,
}

/// Seconds between two lists of all namespaces, or `--sync-interval`, whichever is longer.
const NAMESPACES: f64 = 3600.0;

/// What lists cost, by `--sync-interval`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lists {
    /// Of both kinds.
    pub(crate) requests: f64,
    pub(crate) pod_bytes: f64,
    pub(crate) namespace_bytes: f64,
}

// === impl Sizes ===

impl Sizes {
    /// Pods with a few containers and `managedFields`.
    pub(crate) fn assumed() -> Self {
        Self {
            pod_bytes: 8_000.0,
            namespace_bytes: 1_000.0,
            namespaces: 500.0,
            events_a_pod: 6.0,
            namespace_changes: 60.0,
        }
    }
}

// === impl Load ===

impl Load {
    pub(crate) fn of(fleet: &Fleet, sizes: Sizes) -> Self {
        let (nodes, pods) = (f64::from(fleet.nodes), f64::from(fleet.pods));
        let watches = nodes * KINDS;
        let ends = 1.0 / CHURN.life.as_secs_f64() + CHURN.rollout / 3600.0;
        let pod_events = nodes * pods * ends * sizes.events_a_pod;
        // Each namespace's change goes to every node.
        let namespace_events = nodes * sizes.namespace_changes / 3600.0;
        Self {
            sizes,
            watches,
            opened: watches / WATCH,
            bookmarks: watches / BOOKMARK,
            bookmark_bytes: watches / BOOKMARK * BOOKMARK_BYTES,
            pod_events,
            pod_event_bytes: pod_events * sizes.pod_bytes,
            namespace_events,
            namespace_event_bytes: namespace_events * sizes.namespace_bytes,
            proofs: nodes / 120.0,
            silence_proofs: nodes / PROOF,
            silence_lists: nodes / SILENCE,
            silence_list_bytes: nodes / SILENCE * sizes.namespaces * sizes.namespace_bytes,
            nodes,
            pods,
        }
    }

    /// Lists of a fleet whose `--sync-interval` is so many seconds.
    pub(crate) fn lists(&self, sync_interval: f64) -> Lists {
        let pods = self.nodes / sync_interval;
        let namespaces = self.nodes / sync_interval.max(NAMESPACES);
        Lists {
            requests: pods + namespaces,
            pod_bytes: pods * self.pods * self.sizes.pod_bytes,
            namespace_bytes: namespaces * self.sizes.namespaces * self.sizes.namespace_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_grows_with_the_fleet_and_lists_shrink_with_the_interval() {
        let load = Load::of(&Fleet::of(5000), Sizes::assumed());
        let close = |a: f64, b: f64| assert!((a - b).abs() < b / 100.0, "{a} is not {b}");
        close(load.watches, 10_000.0);
        close(load.opened, 22.2);
        close(load.bookmarks, 166.7);
        close(load.proofs, load.lists(120.0).requests - load.nodes / 3600.0);
        close(load.silence_proofs, 83.3);
        close(load.silence_lists, 66.7);
        close(load.silence_list_bytes, 33.3e6);
        close(load.lists(120.0).requests, 41.7 + 1.39);
        close(load.lists(120.0).namespace_bytes, load.lists(1200.0).namespace_bytes);
        close(load.lists(120.0).pod_bytes, 33.3e6);
        close(load.lists(1200.0).pod_bytes, 3.33e6);
        // 500,000 pods live 8 h, and a tenth of them is replaced each hour.
        close(load.pod_events, 6.0 * (500_000.0 / 28_800.0 + 50_000.0 / 3600.0));
        close(
            Load::of(&Fleet::of(50), Sizes::assumed()).namespace_events,
            load.namespace_events / 100.0,
        );
    }
}
