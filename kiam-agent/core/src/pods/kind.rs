//! The kinds of objects that the table holds, and where it has each.

use std::hash::Hash;

use tokio::time::Instant;

use super::{
    Namespace, Pod, PodUid, ServiceAccount,
    index::LastHeard,
    records::{Change, Records, Version},
    tables::Tables,
};
use crate::role::AccountName;

/// What a [`super::PodIndex`] takes: a [`Pod`], a [`Namespace`] or a [`ServiceAccount`].
pub trait Record: RecordKind {}

impl<R: RecordKind> Record for R {}

/// Seals [`Record`].
pub trait RecordKind: PartialEq + Sized {
    /// By which the object is found.
    type Key: Clone + Eq + Hash;
    /// Whether pods that could not be told apart because this kind's watch was stale are looked up again.
    const OPENS_LOOKUPS: bool = false;

    fn key(&self) -> &Self::Key;

    /// Key, version, and the rest, which says whether anything changed: an object has a new version at each touch of
    /// whatever else it holds.
    fn split(self) -> (Self::Key, Version, Self);

    /// The version at which it went.
    fn gone_at(&self, tables: &Tables) -> Version;

    fn table(tables: &Tables) -> &Records<Self::Key, Self>;

    fn table_mut(tables: &mut Tables) -> &mut Records<Self::Key, Self>;

    /// Brings what else depends on this kind up to date; whether anything changed.
    fn follow(_tables: &mut Tables, changes: impl IntoIterator<Item = Change<Self>>) -> bool {
        changes.into_iter().next().is_some()
    }

    /// When the watch of this kind was last heard from.
    fn heard(heard: &mut LastHeard) -> &mut Option<Instant>;
}

impl RecordKind for Pod {
    type Key = PodUid;
    const OPENS_LOOKUPS: bool = true;

    fn key(&self) -> &PodUid {
        &self.uid
    }

    fn split(mut self) -> (PodUid, Version, Self) {
        let version = self.resource_version.take();
        (self.uid.clone(), version, self)
    }

    /// Nothing of a pod is newer than anything that was seen up to its end.
    fn gone_at(&self, tables: &Tables) -> Version {
        tables.pods.newest()
    }

    fn table(tables: &Tables) -> &Records<Self::Key, Self> {
        &tables.pods
    }

    fn table_mut(tables: &mut Tables) -> &mut Records<Self::Key, Self> {
        &mut tables.pods
    }

    fn follow(tables: &mut Tables, changes: impl IntoIterator<Item = Change<Self>>) -> bool {
        tables.follow(changes)
    }

    fn heard(heard: &mut LastHeard) -> &mut Option<Instant> {
        &mut heard.pods
    }
}

impl RecordKind for Namespace {
    type Key = String;

    fn key(&self) -> &String {
        &self.name
    }

    fn split(mut self) -> (String, Version, Self) {
        let version = self.resource_version.take();
        (self.name.clone(), version, self)
    }

    fn gone_at(&self, _: &Tables) -> Version {
        self.resource_version
    }

    fn table(tables: &Tables) -> &Records<Self::Key, Self> {
        &tables.namespaces
    }

    fn table_mut(tables: &mut Tables) -> &mut Records<Self::Key, Self> {
        &mut tables.namespaces
    }

    fn heard(heard: &mut LastHeard) -> &mut Option<Instant> {
        &mut heard.namespaces
    }
}

impl RecordKind for ServiceAccount {
    type Key = AccountName;

    fn key(&self) -> &AccountName {
        &self.name
    }

    fn split(mut self) -> (AccountName, Version, Self) {
        let version = self.resource_version.take();
        (self.name.clone(), version, self)
    }

    fn gone_at(&self, _: &Tables) -> Version {
        self.resource_version
    }

    fn table(tables: &Tables) -> &Records<Self::Key, Self> {
        &tables.accounts
    }

    fn table_mut(tables: &mut Tables) -> &mut Records<Self::Key, Self> {
        &mut tables.accounts
    }

    fn heard(heard: &mut LastHeard) -> &mut Option<Instant> {
        &mut heard.accounts
    }
}
