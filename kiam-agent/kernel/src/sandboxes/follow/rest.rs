//! Pauses between the scans of a pod, and intervals.

use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep};

use super::{Sandboxes, TaskResult};
use kiam_core::pods::PodUid;

// === impl Sandboxes ===

impl Sandboxes {
    /// Schedules one scan of the pod after `rest`.
    pub(super) fn rest(&mut self, pod: &PodUid, rest: Duration) {
        let Some(sandbox) = self.pods.get_mut(pod).filter(|sandbox| !sandbox.resting) else {
            return;
        };
        sandbox.resting = true;
        let (pod, birth) = (pod.clone(), sandbox.birth);
        self.tasks.spawn(async move {
            sleep(rest).await;
            TaskResult::Rested { pod, birth }
        });
    }

    pub(super) fn rescan(&mut self, pod: &PodUid, birth: u64) {
        if self.pods.get(pod).is_some_and(|sandbox| sandbox.birth == birth && !sandbox.scanning) {
            self.scan(pod);
        }
    }

    pub(super) fn rested(&mut self, pod: &PodUid, birth: u64) {
        if let Some(sandbox) = self.pods.get_mut(pod).filter(|sandbox| sandbox.birth == birth) {
            sandbox.resting = false;
            self.scan(pod);
        }
    }
}

pub(super) fn ticks(first: Duration, period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + first, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
