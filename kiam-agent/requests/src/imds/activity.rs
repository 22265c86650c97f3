//! When each pod asked last, and how often, for operators.
//!
//! Every answer writes here, so that it takes no lock that another pod's answer holds for long: each pod has counters of its
//! own, which answers only read their way to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dashmap::DashMap;

use kiam_core::{maps::Hashing, pods::PodUid};

/// The most pods that are counted: more than a node runs, and than ended lately. Beyond that all are forgotten, and those
/// that go on asking come back with their next request.
const COUNTED_PODS: usize = 2048;

/// The counters of each pod. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Activity(Arc<DashMap<PodUid, Counters, Hashing>>);

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    credentials: AtomicU64,
    without_token: AtomicU64,
    /// In seconds of the epoch; 0 before the first.
    last: AtomicU64,
}

/// What an answered request was.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answered {
    /// Answered with credentials.
    pub(super) credentials: bool,
    /// Accepted without a session token.
    pub(super) without_token: bool,
}

/// The requests of one pod since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// All of them.
    pub requests: u64,
    /// Those that were answered with credentials.
    pub credentials: u64,
    /// Those that were accepted without a session token (IMDSv1).
    pub without_token: u64,
    /// The time of the last one.
    pub last: Option<SystemTime>,
}

// === impl Activity ===

impl Activity {
    /// Counts a request of the pod `uid`.
    pub(super) fn count(&self, uid: &PodUid, answered: Answered, now: SystemTime) {
        match self.0.get(uid) {
            Some(counters) => counters.add(answered, now),
            None => {
                if self.0.len() >= COUNTED_PODS {
                    self.0.clear();
                }
                self.0.entry(uid.clone()).or_default().add(answered, now);
            }
        }
    }

    /// The requests of the pod `uid`.
    pub(super) fn of(&self, uid: &PodUid) -> RequestCounts {
        self.0.get(uid).map(|counters| counters.read()).unwrap_or_default()
    }
}

// === impl Counters ===

impl Counters {
    fn add(&self, answered: Answered, now: SystemTime) {
        self.requests.fetch_add(1, Relaxed);
        self.credentials.fetch_add(u64::from(answered.credentials), Relaxed);
        self.without_token.fetch_add(u64::from(answered.without_token), Relaxed);
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.last.store(seconds, Relaxed);
    }

    fn read(&self) -> RequestCounts {
        let last = Some(self.last.load(Relaxed)).filter(|seconds| *seconds > 0);
        RequestCounts {
            requests: self.requests.load(Relaxed),
            credentials: self.credentials.load(Relaxed),
            without_token: self.without_token.load(Relaxed),
            last: last.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::pods::fixtures::uid;

    #[test]
    fn each_pod_is_counted_on_its_own_and_the_pods_are_bounded() {
        let activity = Activity::default();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let issued = Answered { credentials: true, without_token: true };
        activity.count(&uid(1), issued, at(5));
        activity.count(&uid(1), Answered::default(), at(7));
        let counts =
            RequestCounts { requests: 2, credentials: 1, without_token: 1, last: Some(at(7)) };
        assert_eq!(activity.of(&uid(1)), counts);
        assert_eq!(activity.of(&uid(2)), RequestCounts::default());
        for n in 0..10_000 {
            activity.count(&uid(n), Answered::default(), at(9));
            assert!(activity.0.len() <= COUNTED_PODS);
        }
        assert_eq!(activity.of(&uid(9_999)).requests, 1);
    }
}
