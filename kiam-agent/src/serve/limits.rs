//! How many connections may be open, in all and by whose they are.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use super::Config;
use crate::pods::{Client, PodUid, Unattested};

/// More pods than a node runs.
const PODS: usize = 256;

/// Whose a connection is, for limits and logs: nobody's share is used up by others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A pod that the kernel attests, whatever addresses it has or shares.
    Pod(PodUid),
    /// Whoever has this address, where only that is known.
    Address(IpAddr),
    /// Anybody who is no pod, all together.
    Stranger,
}

/// Hands out slots.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    open: Arc<Mutex<Open>>,
    config: Config,
}

#[derive(Debug, Default)]
struct Open {
    in_all: usize,
    by_owner: HashMap<Owner, usize>,
}

/// One open connection; dropping it makes room.
#[derive(Debug)]
pub(super) struct Slot {
    limits: Limits,
    owner: Owner,
}

/// Raises the soft limit of open files, which is 1024 under many a runtime, to the hard one; what it is then.
pub fn raise_open_files() -> Rlimit {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if setrlimit(Resource::Nofile, raised).is_ok() { raised } else { limit }
}

/// How many connections of the `wanted` the process may have open files for, beside `others`.
pub(super) fn within_open_files(wanted: usize, others: usize) -> usize {
    let limit = raise_open_files();
    let room = room(limit.current, others);
    if room < wanted {
        warn!(
            open_files = limit.current,
            connections = room,
            wanted,
            others,
            "The limit of open files (RLIMIT_NOFILE) allows fewer connections than are wanted"
        );
    }
    room.min(wanted)
}

/// Connections that `open_files` are enough for, beside `others`, which get half at most: one that is passed on needs
/// two.
fn room(open_files: Option<u64>, others: usize) -> usize {
    let files = open_files.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX));
    ((files - others.min(files / 2)) / 2).max(1)
}

// === impl Owner ===

impl Owner {
    /// The owner of a connection that is `client`'s.
    #[must_use]
    pub fn of(client: &Result<Client, Unattested>) -> Self {
        match client {
            Ok(client) | Err(Unattested::Unknown { client, .. }) => match client {
                Client::Pod { uid, .. } | Client::Inside { uid } => Self::Pod(uid.clone()),
                Client::Address(address) => Self::Address(address.to_canonical()),
            },
            Err(_) => Self::Stranger,
        }
    }
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(config: Config) -> Self {
        Self { open: Arc::default(), config }
    }

    /// Whether there is room for anybody, to be asked before more is found out about a connection.
    pub(super) fn has_room(&self) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.in_all < self.config.connections
    }

    /// A slot for a connection of `owner`, while there is room. Half of the room is for those that have few: pods
    /// that each keep to their limit must not together take everything.
    pub(super) fn take(&self, owner: Owner) -> Option<Slot> {
        let own = match owner {
            Owner::Pod(_) | Owner::Address(_) => self.config.connections_per_pod,
            Owner::Stranger => self.config.connections_of_strangers,
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let held = open.by_owner.get(&owner).copied().unwrap_or_default();
        let half = self.config.connections / 2;
        let own = if open.in_all < half { own } else { own.min((half / PODS).max(2)) };
        if open.in_all >= self.config.connections || held >= own {
            return None;
        }
        open.in_all += 1;
        open.by_owner.insert(owner.clone(), held + 1);
        Some(Slot { limits: self.clone(), owner })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.in_all -= 1;
        if let Some(held) = open.by_owner.get_mut(&self.owner) {
            *held -= 1;
            if *held == 0 {
                open.by_owner.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::fixtures::{attested, uid};

    #[test]
    fn connections_leave_open_files_for_all_else() {
        let cases = [
            (Some(1024), 256, 384),
            (Some(1_048_576), 256, 524_160),
            (Some(1024), 2000, 256),
            (Some(1), 256, 1),
        ];
        for (files, others, connections) in cases {
            assert_eq!(room(files, others), connections, "{files:?}, {others}");
        }
        assert!(room(None, 256) > 1_000_000);
        assert_eq!(within_open_files(1, 256), 1);
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum, "the soft limit is raised");
    }

    #[test]
    fn one_owner_cannot_take_every_slot_and_closing_makes_room() {
        let limits = Limits::new(Config {
            connections: 5,
            connections_per_pod: 2,
            connections_of_strangers: 1,
            ..Config::default()
        });
        let pod = |n, address| Owner::of(&Ok(attested(uid(n), address)));
        let stranger = || Owner::of(&Err(Unattested::NoEntry));
        // Its addresses make no difference, and neither do others on the same.
        let held = [limits.take(pod(1, "10.0.0.1")), limits.take(pod(1, "fd00::1"))];
        assert!(held.iter().all(Option::is_some) && limits.take(pod(1, "10.0.0.1")).is_none());
        let other = limits.take(pod(2, "10.0.0.1"));
        let strange = limits.take(stranger());
        assert!(other.is_some() && strange.is_some() && limits.take(stranger()).is_none());
        assert!(limits.has_room());
        let mapped = Client::Address("::ffff:10.0.0.1".parse().unwrap());
        let address = limits.take(Owner::of(&Ok(mapped)));
        assert!(address.is_some() && !limits.has_room());
        assert!(limits.take(pod(2, "10.0.0.1")).is_none(), "the limit of all");
        drop(held);
        assert!(limits.take(pod(1, "10.0.0.1")).is_some());
        drop((other, strange, address));
        assert!(limits.open.lock().unwrap().by_owner.is_empty());
    }

    #[test]
    fn owners_with_many_leave_room_for_those_with_few() {
        let limits = Limits::new(Config::default());
        let take = |n| limits.take(Owner::of(&Ok(attested(uid(n), "10.0.0.1"))));
        let mut held = Vec::new();
        for hoarder in 1..=100 {
            held.extend(std::iter::from_fn(|| take(hoarder)));
        }
        assert!(held.len() >= limits.config.connections / 2, "{} is no crowd", held.len());
        for late in 101..=200 {
            let own: Vec<_> = (0..8).map_while(|_| take(late)).collect();
            assert_eq!(own.len(), 8, "pod {late}");
            held.extend(own);
        }
    }
}
