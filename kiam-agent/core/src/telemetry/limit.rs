//! Limits the log lines of frequent events.

use std::{
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::maps::RequestMap;

/// Kinds that are remembered at once. Events of further kinds are dropped until some are forgotten.
const KINDS: usize = 4096;

/// A limit of one event of each kind per period, which counts the events that it drops.
#[derive(Debug)]
pub struct LogLimit<K> {
    period: Duration,
    kinds: Mutex<RequestMap<K, KindState>>,
}

/// The state of a kind: its last logged event, and the events dropped since.
#[derive(Debug)]
struct KindState {
    at: Instant,
    left_out: u64,
}

// === impl LogLimit ===

impl<K: Eq + Hash> LogLimit<K> {
    /// A limit of one event of each kind per `period`.
    #[must_use]
    pub fn new(period: Duration) -> Self {
        Self { period, kinds: Mutex::default() }
    }

    /// The number of events dropped since the last one, if an event of this kind is to be logged now.
    pub fn admit(&self, kind: K) -> Option<u64> {
        let now = Instant::now();
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(since) = kinds.get_mut(&kind) {
            if now.duration_since(since.at) < self.period {
                since.left_out += 1;
                return None;
            }
            let left_out = since.left_out;
            *since = KindState { at: now, left_out: 0 };
            return Some(left_out);
        }
        if kinds.len() >= KINDS {
            kinds.retain(|_, since| now.duration_since(since.at) < self.period);
        }
        if kinds.len() >= KINDS {
            return None;
        }
        kinds.insert(kind, KindState { at: now, left_out: 0 });
        Some(0)
    }
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
