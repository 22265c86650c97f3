//! A share of lines for each pod. Repeats on a connection are counted. Beyond a pod's share, hand-outs are counted by process
//! and key, and beyond that they are dropped, so that a pod that floods costs no other pod a line.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use tokio::time::Instant;

use super::hand_out::HandOut;
use kiam_core::{
    maps::{Hashing, RequestMap},
    pods::PodUid,
    rate::{Bucket, Rate},
};

/// The rate of one pod's lines. A line has 700 bytes, so that a pod that floods writes 60 MB a day.
const LINES: Rate = Rate { burst: 60, period: Duration::from_secs(1) };
/// The most connections of one pod whose repeats are counted: the kernel's quota, which is the most that can be open.
const CONNECTIONS: usize = 256;
/// The most lines about a pod's repeats in one flush.
const GROUPS: usize = 16;
/// The most lines of one pod that wait to be written.
const QUEUED: usize = 64;

/// The shares of all pods.
#[derive(Default)]
pub(super) struct Shares(DashMap<PodUid, Share, Hashing>);

#[derive(Default)]
struct Share {
    lines: Bucket,
    inspections: Bucket,
    connections: RequestMap<u64, OpenConnection>,
    /// Hand-outs beyond the rate.
    others: Repeats,
    queued: Arc<AtomicUsize>,
}

/// A connection that was written about.
struct OpenConnection {
    first: Arc<HandOut>,
    repeats: AtomicU64,
}

/// Hand-outs by process and key.
#[derive(Default)]
struct Repeats {
    groups: Vec<(Arc<HandOut>, u64)>,
    /// Those that no group was left for.
    dropped: u64,
}

/// A line to write.
pub(super) struct Entry {
    pub(super) hand_out: Arc<HandOut>,
    /// The number of hand-outs that it stands for.
    pub(super) count: u64,
    /// Whether they are repeats, or beyond the pod's share.
    pub(super) coalesced: bool,
    pub(super) place: Place,
}

/// A place of the pod's in the queues, which is free again when this is dropped.
pub(super) struct Place(Arc<AtomicUsize>);

// === impl Shares ===

impl Shares {
    /// Whether the connection `socket` of the pod has got the key before, which is then counted.
    pub(super) fn is_repeat(&self, pod: &PodUid, socket: u64, key: &str) -> bool {
        let Some(share) = self.0.get(pod) else { return false };
        match share.connections.get(&socket) {
            Some(open) if *open.first.access_key_id == *key => {
                open.repeats.fetch_add(1, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    /// A place for a new connection of the pod whose process is to be inspected at once, if the pod's share has one. It is
    /// that of lines: beyond it no line would show what was found.
    pub(super) fn inspects(&self, pod: &PodUid, now: Instant) -> Option<Place> {
        let mut share = self.0.entry(pod.clone()).or_default();
        let place = Place::take(&share.queued)?;
        share.inspections.try_take(LINES, now).then_some(place)
    }

    /// The entry of a connection's first hand-out of a key; `None` if it is only counted, and an error with the number of
    /// hand-outs that are dropped.
    pub(super) fn admit(&self, hand_out: Arc<HandOut>, now: Instant) -> Result<Option<Entry>, u64> {
        let mut share = self.0.entry(hand_out.pod.uid.clone()).or_default();
        share.admit(hand_out, now)
    }

    /// The entries of repeats. Forgets connections without repeats, and pods without connections.
    pub(super) fn flush(&self) -> Vec<Result<Option<Entry>, u64>> {
        let mut entries = Vec::new();
        self.0.retain(|_, share| {
            share.flush(&mut entries);
            !share.is_idle(Instant::now())
        });
        entries
    }

    #[cfg(test)]
    pub(super) fn pods(&self) -> usize {
        self.0.len()
    }
}

// === impl Share ===

impl Share {
    fn admit(&mut self, hand_out: Arc<HandOut>, now: Instant) -> Result<Option<Entry>, u64> {
        let socket = hand_out.socket();
        let has_room =
            self.connections.len() < CONNECTIONS || self.connections.contains_key(&socket);
        if has_room
            && self.lines.wait(LINES, now).is_zero()
            && let Some(place) = Place::take(&self.queued)
        {
            self.lines.take(LINES, now);
            let open = OpenConnection { first: hand_out.clone(), repeats: AtomicU64::new(0) };
            if let Some(before) = self.connections.insert(socket, open) {
                // Another key, or a connection that the kernel does not attest.
                self.others.add(before.first, before.repeats.into_inner());
            }
            return Ok(Some(Entry { hand_out, count: 1, coalesced: false, place }));
        }
        match self.others.add(hand_out, 1) {
            true => Ok(None),
            false => Err(std::mem::take(&mut self.others.dropped)),
        }
    }

    fn flush(&mut self, entries: &mut Vec<Result<Option<Entry>, u64>>) {
        let mut repeats = std::mem::take(&mut self.others);
        self.connections.retain(|_, open| {
            let count = std::mem::take(open.repeats.get_mut());
            repeats.add(open.first.clone(), count);
            count > 0
        });
        for (hand_out, count) in repeats.groups {
            entries.push(match Place::take(&self.queued) {
                Some(place) => Ok(Some(Entry { hand_out, count, coalesced: true, place })),
                None => Err(count),
            });
        }
        if repeats.dropped > 0 {
            entries.push(Err(repeats.dropped));
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        let queued = self.queued.load(Ordering::Relaxed);
        self.connections.is_empty()
            && queued == 0
            && self.lines.is_full(now)
            && self.inspections.is_full(now)
    }
}

// === impl Repeats ===

impl Repeats {
    /// Adds hand-outs; `false` if no group is left.
    fn add(&mut self, hand_out: Arc<HandOut>, count: u64) -> bool {
        if count == 0 {
            return true;
        }
        if let Some((_, of_group)) = self.groups.iter_mut().find(|(it, _)| it.is_like(&hand_out)) {
            *of_group += count;
            return true;
        }
        if self.groups.len() == GROUPS {
            self.dropped += count;
            return false;
        }
        self.groups.push((hand_out, count));
        true
    }
}

// === impl Place ===

impl Place {
    /// A place, if the pod has one left. Only the pod's share calls this, under its lock.
    fn take(queued: &Arc<AtomicUsize>) -> Option<Self> {
        if queued.load(Ordering::Relaxed) >= QUEUED {
            return None;
        }
        queued.fetch_add(1, Ordering::Relaxed);
        Some(Self(queued.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
