//! How many connections may be open, in all and from one address.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Hands out slots.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    open: Arc<Mutex<Open>>,
    in_all: usize,
    per_peer: usize,
}

#[derive(Debug, Default)]
struct Open {
    in_all: usize,
    by_peer: HashMap<IpAddr, usize>,
}

/// One open connection; dropping it makes room.
#[derive(Debug)]
pub(super) struct Slot {
    limits: Limits,
    peer: IpAddr,
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(in_all: usize, per_peer: usize) -> Self {
        Self { open: Arc::default(), in_all, per_peer }
    }

    /// A slot for a connection from `peer`, while there is room.
    pub(super) fn take(&self, peer: IpAddr) -> Option<Slot> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let held = open.by_peer.get(&peer).copied().unwrap_or_default();
        if open.in_all >= self.in_all || held >= self.per_peer {
            return None;
        }
        open.in_all += 1;
        open.by_peer.insert(peer, held + 1);
        Some(Slot { limits: self.clone(), peer })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.in_all -= 1;
        if let Some(held) = open.by_peer.get_mut(&self.peer) {
            *held -= 1;
            if *held == 0 {
                open.by_peer.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_cannot_take_every_slot_and_closing_makes_room() {
        let limits = Limits::new(3, 2);
        let a: IpAddr = "10.0.0.1".parse().unwrap();
        let b: IpAddr = "10.0.0.2".parse().unwrap();
        let held = [limits.take(a), limits.take(a)];
        assert!(held.iter().all(Option::is_some));
        assert!(limits.take(a).is_none());
        let other = limits.take(b);
        assert!(other.is_some() && limits.take(b).is_none());
        drop(held);
        assert!(limits.take(a).is_some());
    }
}
