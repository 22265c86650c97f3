//! The kinds of objects in the pod table.

use std::hash::Hash;

use tokio::time::Instant;

use super::{
    Changed, Namespace, Pod, PodUid, ServiceAccount,
    index::LastHeard,
    records::{Change, Records, Version},
    tables::Tables,
};
use crate::role::AccountName;

/// A record of a [`super::PodIndex`]: a [`Pod`], a [`Namespace`] or a [`ServiceAccount`].
pub trait Record: RecordKind {}

impl<R: RecordKind> Record for R {}

/// A kind of records and its place in the tables. It seals [`Record`].
pub trait RecordKind: PartialEq + Sized {
    /// The object's key.
    type Key: Clone + Eq + Hash;
    /// Whether pending lookups are retried when the watch of this kind is no longer stale.
    const OPENS_LOOKUPS: bool = false;

    fn key(&self) -> &Self::Key;

    /// The key, the version, and the rest. The rest shows whether anything changed: an object gets a new version with
    /// each write, also of fields that are not recorded here.
    fn split(self) -> (Self::Key, Version, Self);

    /// The version of the object's deletion.
    fn gone_at(&self, tables: &Tables) -> Version;

    fn table(tables: &Tables) -> &Records<Self::Key, Self>;

    fn table_mut(tables: &mut Tables) -> &mut Records<Self::Key, Self>;

    /// Updates what depends on this kind, and returns whether anything changed.
    fn follow(tables: &mut Tables, changes: impl IntoIterator<Item = Change<Self>>) -> bool {
        let mut changed = false;
        for Change { before, after } in changes {
            changed = true;
            if let Some(record) = after.or(before) {
                tables.log.push(record.changed());
            }
        }
        changed
    }

    /// The object, for the log of changes.
    fn changed(&self) -> Changed;

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

    /// The newest version seen: no record of the pod can be newer than its end.
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

    fn changed(&self) -> Changed {
        Changed::Pod(self.uid.clone())
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

    fn changed(&self) -> Changed {
        Changed::Namespace(self.name.clone())
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

    fn changed(&self) -> Changed {
        Changed::Account(self.name.clone())
    }

    fn heard(heard: &mut LastHeard) -> &mut Option<Instant> {
        &mut heard.accounts
    }
}
