//! Sweeps: which pods are scanned though no event says that anything changed.

use super::{Change, Sandbox, Sandboxes};
use kiam_core::pods::PodUid;

/// In how many sweeps each pod with a listener is scanned once, where no event has said that anything changed.
const TURNS: u64 = 20;

// === impl Sandboxes ===

impl Sandboxes {
    /// Scans all pods.
    pub(super) fn sweep(&mut self) {
        let mut changes = self.watch.sweep();
        for change in &mut changes {
            if let Change::Swept(pod) = change {
                *change = Change::Members(pod.clone());
            }
        }
        self.take(changes);
    }

    /// A pod with a listener waits for its turn: events show what happens to its sandbox, and a scan of all pods at once would
    /// wake a quiet node.
    pub(super) fn swept(&mut self, pod: &PodUid) {
        let has_turn = |sandbox: &Sandbox| sandbox.birth % TURNS == u64::from(self.sweeps) % TURNS;
        if self.pods.get(pod).is_some_and(|sandbox| !sandbox.is_settled() || has_turn(sandbox)) {
            self.members_changed(pod);
        }
    }
}
