//! The limits of open connections, in all and by owner, and of new connections per owner.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Config, share::Share};
use kiam_core::{
    pods::{Client, PodUid, Unattested},
    rate::Bucket,
};

/// The number of pods among which half of the connections are divided: more than a node runs.
const SHARING_PODS: usize = 256;
/// The most owners. A node has far fewer pods, but addresses (`--identity=source-ip`) can be invented.
const OWNERS: usize = 16_384;
/// The shortest time between two sweeps of unused owners.
const SWEEP: Duration = Duration::from_millis(100);

/// The owner of a connection, for limits and logs. Each owner has its own share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A pod that the kernel attests, whatever its addresses.
    Pod(PodUid),
    /// The owner of this address, where only the address is known.
    Address(IpAddr),
    /// All callers that are not pods, together.
    Stranger,
}

/// The limits, which hand out slots.
#[derive(Clone)]
pub(super) struct Limits {
    open: Arc<Mutex<OpenConnections>>,
    config: Config,
    /// How many lanes an owner has.
    lanes: usize,
}

struct OpenConnections {
    in_all: usize,
    next: u64,
    owners: HashMap<Owner, Account>,
    /// The time of the last sweep of unused owners.
    swept: Instant,
}

/// One owner's open connections, and the rest of its share.
struct Account {
    /// The open connections, the oldest first.
    open: BTreeMap<u64, Arc<Activity>>,
    new_connections: Bucket,
    share: Arc<Share>,
}

/// The activity of a connection.
#[derive(Debug, Default)]
struct Activity {
    /// The time since when the connection is idle; `None` while it is busy.
    idle_since: Mutex<Option<Instant>>,
    /// Cancelled to end the connection.
    end: CancellationToken,
}

/// The slot of one open connection. Dropping it makes room.
pub(super) struct Slot {
    limits: Limits,
    owner: Owner,
    number: u64,
    activity: Arc<Activity>,
    share: Arc<Share>,
    replaced: bool,
}

/// The limit that a new connection exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ExceededLimit {
    /// The open connections in all.
    All,
    /// The open connections of the owner, none of which is idle.
    Open,
    /// The owner's rate of new connections.
    Rate,
    /// The number of owners.
    Owners,
}

/// Raises the soft limit of open files, which is often 1024, to the hard limit, and returns the new limits.
pub fn raise_open_files() -> Rlimit {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if setrlimit(Resource::Nofile, raised).is_ok() { raised } else { limit }
}

/// The number of connections for which the process has open files beside `others`, at most `desired`.
pub(super) fn within_open_files(desired: usize, others: usize) -> usize {
    let limit = raise_open_files();
    let room = room(limit.current, others);
    if room < desired {
        warn!(
            open_files = limit.current,
            connections = room,
            desired,
            others,
            "The limit of open files (RLIMIT_NOFILE) allows fewer connections than configured"
        );
    }
    room.min(desired)
}

/// The number of connections that [`raise_open_files`] leaves room for, with the limit.
#[must_use]
pub fn open_files(config: &Config) -> (Option<u64>, usize) {
    let limit = raise_open_files().current;
    (limit, room(limit, config.other_files))
}

/// The number of connections for `open_files`, beside `others`, which get half at most. A connection that is passed on
/// needs two files.
fn room(open_files: Option<u64>, others: usize) -> usize {
    let files = open_files.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX));
    ((files - others.min(files / 2)) / 2).max(1)
}

// === impl Owner ===

impl Owner {
    /// The owner of a connection of `client`.
    #[must_use]
    pub fn of(client: &Result<Client, Unattested>) -> Self {
        match client {
            Ok(client) | Err(Unattested::Unknown { client, .. }) => match client {
                Client::Pod { uid, .. } | Client::PodListener { uid, .. } => Self::Pod(uid.clone()),
                Client::Address(address) => Self::Address(address.to_canonical()),
            },
            Err(_) => Self::Stranger,
        }
    }
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(config: Config, lanes: usize) -> Self {
        let open =
            OpenConnections { in_all: 0, next: 0, owners: HashMap::new(), swept: Instant::now() };
        Self { open: Arc::new(Mutex::new(open)), config, lanes }
    }

    /// Whether there is room for any connection. Checked before the caller is resolved.
    pub(super) fn has_room(&self) -> bool {
        self.open().in_all < self.config.connections
    }

    /// Takes a slot for a connection of `owner`, if there is room. Half of the room is for owners with few connections, so
    /// that pods within their limits can't use all of it together. An owner at its limit gets the slot of its longest idle
    /// connection, so that a pod that leaks connections is still served. The connection ends when `all_end` is cancelled.
    pub(super) fn take(
        &self,
        owner: Owner,
        all_end: &CancellationToken,
    ) -> Result<Slot, ExceededLimit> {
        let now = Instant::now();
        let mut open = self.open();
        if open.in_all >= self.config.connections {
            return Err(ExceededLimit::All);
        }
        let own = self.own(&owner, open.in_all);
        let number = open.next;
        let account = open.account(&owner, self, now).ok_or(ExceededLimit::Owners)?;
        if !account.new_connections.try_take(self.config.new_connections, now) {
            return Err(ExceededLimit::Rate);
        }
        let full = account.open.len() >= own;
        // Strangers are many parties, whose connections must not replace each other.
        if full && (owner == Owner::Stranger || !account.end_idle()) {
            return Err(ExceededLimit::Open);
        }
        let activity = Arc::new(Activity { end: all_end.child_token(), ..Activity::default() });
        let share = account.share.clone();
        account.open.insert(number, activity.clone());
        open.in_all += 1;
        open.next += 1;
        Ok(Slot { limits: self.clone(), owner, number, activity, share, replaced: full })
    }

    /// Waits until `owner` may open another connection.
    pub(super) async fn may_open(&self, owner: &Owner) {
        let wait = || {
            let now = Instant::now();
            let open = self.open();
            let rate = self.config.new_connections;
            open.owners.get(owner).map_or(Duration::ZERO, |own| own.new_connections.wait(rate, now))
        };
        let mut left = wait();
        while !left.is_zero() {
            sleep(left).await;
            left = wait();
        }
    }

    /// The limit of `owner`'s connections while `in_all` are open.
    fn own(&self, owner: &Owner, in_all: usize) -> usize {
        let own = match owner {
            Owner::Pod(_) | Owner::Address(_) => self.config.connections_per_pod,
            Owner::Stranger => self.config.connections_of_strangers,
        };
        let half = self.config.connections / 2;
        if in_all < half { own } else { own.min((half / SHARING_PODS).max(2)) }
    }

    fn open(&self) -> MutexGuard<'_, OpenConnections> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl OpenConnections ===

impl OpenConnections {
    /// The account of `owner`, created if it is missing; `None` if there are too many.
    fn account(&mut self, owner: &Owner, limits: &Limits, now: Instant) -> Option<&mut Account> {
        if !self.owners.contains_key(owner) {
            self.forget(now);
            if self.owners.len() >= OWNERS {
                return None;
            }
        }
        let account = self.owners.entry(owner.clone());
        Some(account.or_insert_with(|| Account {
            open: BTreeMap::new(),
            new_connections: Bucket::default(),
            share: Arc::new(Share::new(limits.config.requests, limits.lanes)),
        }))
    }

    /// Forgets owners whose account is like a new one. Not for every new owner, since this reads all accounts.
    fn forget(&mut self, now: Instant) {
        if now.duration_since(self.swept) >= SWEEP {
            self.owners.retain(|_, account| !account.is_unused(now));
            self.swept = now;
        }
    }
}

// === impl Account ===

impl Account {
    fn is_unused(&self, now: Instant) -> bool {
        self.open.is_empty() && self.new_connections.is_full(now) && self.share.is_unused(now)
    }

    /// Ends the longest idle connection; `false` if none is idle.
    fn end_idle(&mut self) -> bool {
        let idle = self.open.iter().filter_map(|(number, activity)| {
            let since = *activity.idle_since.lock().unwrap_or_else(PoisonError::into_inner);
            Some((since?, *number))
        });
        let Some((_, number)) = idle.min() else { return false };
        if let Some(ended) = self.open.remove(&number) {
            ended.end.cancel();
        }
        true
    }
}

// === impl Slot ===

impl Slot {
    /// Whether another connection of the owner was ended for this one.
    pub(super) fn has_replaced(&self) -> bool {
        self.replaced
    }

    pub(super) fn share(&self) -> &Arc<Share> {
        &self.share
    }

    /// Returns when the connection has to end.
    pub(super) async fn ended(&self) {
        self.activity.end.cancelled().await;
    }

    /// Marks the connection as idle since `now`.
    pub(super) fn idle(&self, now: Instant) {
        self.set_idle_since(Some(now));
    }

    /// Returns when the connection has been idle for as long as `deadline`. It sleeps for that long at a time, and looks
    /// only then, so that a request costs no timer.
    pub(super) async fn idle_for(&self, deadline: Duration) {
        let left = || {
            let since = *self.activity.idle_since.lock().unwrap_or_else(PoisonError::into_inner);
            since.map_or(deadline, |since| deadline.saturating_sub(since.elapsed()))
        };
        let mut wait = left();
        while !wait.is_zero() {
            sleep(wait).await;
            wait = left();
        }
    }

    /// Marks the connection as busy.
    pub(super) fn busy(&self) {
        self.set_idle_since(None);
    }

    fn set_idle_since(&self, since: Option<Instant>) {
        *self.activity.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.limits.open();
        open.in_all -= 1;
        if let Some(account) = open.owners.get_mut(&self.owner) {
            account.open.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::time::advance;

    use super::*;
    use kiam_core::pods::fixtures::{attested, uid};
    use kiam_core::rate::Rate;

    fn new(config: Config) -> Limits {
        Limits::new(config, 2)
    }

    fn take_of(limits: &Limits, owner: Owner) -> Result<Slot, ExceededLimit> {
        limits.take(owner, &CancellationToken::new())
    }

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
        let limits = new(Config {
            connections: 5,
            connections_per_pod: 2,
            connections_of_strangers: 1,
            ..Config::default()
        });
        let pod = |n, address| Owner::of(&Ok(attested(uid(n), address)));
        let stranger = || Owner::of(&Err(Unattested::NoEntry));
        let beyond = |owner| take_of(&limits, owner).err();
        // Its addresses make no difference, and neither do others on the same.
        let held = [take_of(&limits, pod(1, "10.0.0.1")), take_of(&limits, pod(1, "fd00::1"))];
        assert!(held.iter().all(Result::is_ok));
        assert_eq!(beyond(pod(1, "10.0.0.1")), Some(ExceededLimit::Open));
        let other = take_of(&limits, pod(2, "10.0.0.1"));
        let strange = take_of(&limits, stranger());
        assert!(other.is_ok() && strange.is_ok());
        strange.as_ref().unwrap().idle(Instant::now());
        assert_eq!(beyond(stranger()), Some(ExceededLimit::Open), "whoever came first stays");
        assert!(limits.has_room());
        let mapped = Client::Address("::ffff:10.0.0.1".parse().unwrap());
        let address = take_of(&limits, Owner::of(&Ok(mapped)));
        assert!(address.is_ok() && !limits.has_room());
        assert_eq!(beyond(pod(2, "10.0.0.1")), Some(ExceededLimit::All));
        drop(held);
        assert!(take_of(&limits, pod(1, "10.0.0.1")).is_ok());
        drop((other, strange, address));
        assert!(limits.open().owners.values().all(|account| account.open.is_empty()));
    }

    #[test]
    fn owners_with_many_leave_room_for_those_with_few() {
        let limits = new(Config::default());
        let take = |n| take_of(&limits, Owner::of(&Ok(attested(uid(n), "10.0.0.1")))).ok();
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

    #[tokio::test(start_paused = true)]
    async fn the_table_of_owners_is_bounded_and_forgets_those_with_a_whole_share_again() {
        let requests = Rate::per_second(1, 10);
        let limits = new(Config { requests, ..Config::default() });
        let take = |n| take_of(&limits, Owner::Address(Ipv4Addr::from_bits(n).into()));
        let owners = u32::try_from(OWNERS).unwrap();
        assert!((0..owners).all(|n| take(n).is_ok()));
        assert_eq!(take(owners).err(), Some(ExceededLimit::Owners));
        let (held, asked) = (take(1).unwrap(), take(2).unwrap());
        assert!(
            (0..10).all(|_| asked.share().admits(Instant::now()))
                && !asked.share().admits(Instant::now())
        );
        drop(asked);
        advance(Duration::from_secs(5)).await;
        assert!(take(owners).is_ok(), "there is room again");
        assert_eq!(limits.open().owners.len(), 3, "one is open, one has asked, and the new one");
        // Going away and coming back gives nobody more than its share.
        assert_eq!((0..10).filter(|_| take(2).unwrap().share().admits(Instant::now())).count(), 5);
        drop(held);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_have_a_rate_and_who_waits_gets_one_when_it_is_there() {
        let new_connections = Rate::per_second(10, 3);
        let limits = new(Config { new_connections, ..Config::default() });
        let owner = |n| Owner::Pod(uid(n));
        let taken = |n| (0..5).filter(|_| take_of(&limits, owner(n)).is_ok()).count();
        assert_eq!((taken(1), taken(2)), (3, 3), "each has its own");
        assert_eq!(take_of(&limits, owner(1)).err(), Some(ExceededLimit::Rate));
        let begun = Instant::now();
        limits.may_open(&owner(3)).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        limits.may_open(&owner(1)).await;
        assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
        assert_eq!(taken(1), 1);
    }
}
