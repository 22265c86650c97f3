//! Limits the log lines of frequent events.

use std::{
    hash::Hash,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::maps::RequestMap;

/// Kinds that are remembered at once. Events of further kinds are dropped until some are forgotten.
const KINDS: usize = 4096;

/// A limit of one event of each kind per period, which counts the events that it drops. An event of a known kind keeps no
/// other waiting.
#[derive(Debug)]
pub struct LogLimit<K> {
    period: Duration,
    began: Instant,
    kinds: RwLock<RequestMap<K, KindState>>,
}

/// The state of a kind.
#[derive(Debug)]
struct KindState {
    /// The time of its last logged event, in nanoseconds since the limit began.
    at: AtomicU64,
    /// Events dropped since.
    left_out: AtomicU64,
}

// === impl LogLimit ===

impl<K: Eq + Hash> LogLimit<K> {
    /// A limit of one event of each kind per `period`.
    #[must_use]
    pub fn new(period: Duration) -> Self {
        Self { period, began: Instant::now(), kinds: RwLock::default() }
    }

    /// The number of events dropped since the last one, if an event of this kind is to be logged now.
    pub fn admit(&self, kind: K) -> Option<u64> {
        self.admit_at(kind, Instant::now())
    }

    /// As [`LogLimit::admit`], for an event that has just happened, at `now`.
    pub fn admit_at(&self, kind: K, now: Instant) -> Option<u64> {
        let now = nanos(now.saturating_duration_since(self.began));
        let known = self.kinds.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = known.get(&kind) {
            return state.admit(now, nanos(self.period));
        }
        drop(known);
        let mut kinds = self.kinds.write().unwrap_or_else(PoisonError::into_inner);
        if kinds.len() >= KINDS {
            kinds.retain(|_, state| !state.is_over(now, nanos(self.period)));
        }
        if let Some(state) = kinds.get(&kind) {
            return state.admit(now, nanos(self.period));
        }
        if kinds.len() >= KINDS {
            return None;
        }
        kinds.insert(kind, KindState { at: AtomicU64::new(now), left_out: AtomicU64::new(0) });
        Some(0)
    }
}

// === impl KindState ===

impl KindState {
    fn admit(&self, now: u64, period: u64) -> Option<u64> {
        let at = self.at.load(Relaxed);
        // Of events at the same time one is logged.
        if self.is_over(now, period) && self.at.compare_exchange(at, now, Relaxed, Relaxed).is_ok()
        {
            return Some(self.left_out.swap(0, Relaxed));
        }
        self.left_out.fetch_add(1, Relaxed);
        None
    }

    fn is_over(&self, now: u64, period: u64) -> bool {
        now.saturating_sub(self.at.load(Relaxed)) >= period
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_event_of_a_kind_passes_in_a_period_and_the_others_are_counted() {
        let limit = LogLimit::new(Duration::from_secs(1));
        assert_eq!((limit.admit("a"), limit.admit("b")), (Some(0), Some(0)));
        for _ in 0..1000 {
            assert_eq!(limit.admit("a"), None);
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((limit.admit("a"), limit.admit("b")), (Some(1000), Some(0)));
        assert_eq!(limit.admit("a"), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(limit.admit("a"), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_bounded_and_comes_back() {
        let limit = LogLimit::new(Duration::from_secs(1));
        let admitted = (0..100_000).filter(|n| limit.admit(*n).is_some()).count();
        assert_eq!(admitted, KINDS);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(limit.admit(99_999), Some(0));
    }
}
