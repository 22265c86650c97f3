//! What tenants do by way of the Kubernetes API.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use lab::{
    Lab, NODE_NAME,
    fake::kubernetes::{NamespaceRecord, PodRecord, Store},
};

const NAMESPACE: &str = "storm";
/// Between two changes of an annotation.
const PAUSE: Duration = Duration::from_millis(10);
/// Pods whose annotations change.
const RESTLESS: u64 = 10;
const BIG_PODS: u64 = 20;
const BIG_POD: usize = 1 << 20;
const BIG_NAMESPACES: u64 = 300;
const BIG_NAMESPACE: usize = 250_000;
/// What no API server allows more of.
const MOST_CHANGES: u64 = 10_000;

/// What a storm is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storm {
    /// Pods of 1 MB and namespaces of 250 kB, of which every list is.
    BigObjects,
    /// Annotations that change in a loop: other roles, other session names.
    Annotations,
    /// Roles that are not allowed, each another one, so that there is always something to tell of.
    Refusals,
}

/// A storm that goes on until it is dropped.
pub(crate) struct RunningStorm {
    store: Arc<Store>,
    ended: Arc<AtomicBool>,
    changes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

// === impl Storm ===

impl Storm {
    pub(crate) fn start(self, lab: &Lab) -> RunningStorm {
        let (store, ended) = (lab.kubernetes.store(), Arc::new(AtomicBool::new(false)));
        let changes = Arc::new(AtomicU64::new(0));
        let nothing = NamespaceRecord::new(NAMESPACE);
        let nothing = match self {
            Self::Refusals => nothing.annotation("iam.amazonaws.com/permitted", "no-role-at-all"),
            _ => nothing,
        };
        store.apply_namespace(&nothing);
        if self == Self::BigObjects {
            big_objects(&store);
        }
        let (own_store, own_ended) = (Arc::clone(&store), Arc::clone(&ended));
        let own_changes = Arc::clone(&changes);
        let rage = move || {
            while !own_ended.load(Ordering::Relaxed) {
                let number = own_changes.fetch_add(1, Ordering::Relaxed);
                if number < MOST_CHANGES {
                    self.change(&own_store, number);
                }
                thread::sleep(PAUSE);
            }
        };
        RunningStorm { store, ended, changes, thread: Some(thread::spawn(rage)) }
    }

    fn change(self, store: &Store, number: u64) {
        match self {
            // Every watch begins again with a list, as after an API server's restart.
            Self::BigObjects if number == 0 => {
                store.compact();
                store.close_watches();
            }
            Self::BigObjects => {}
            Self::Annotations | Self::Refusals => {
                let pod = pod(number % RESTLESS)
                    .role(&format!("storm-{number}"))
                    .annotation("iam.amazonaws.com/session-name", &format!("session-{number}"));
                store.apply_pod(&pod);
            }
        }
    }
}

// === impl RunningStorm ===

impl RunningStorm {
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl Drop for RunningStorm {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
        for number in 0..RESTLESS.max(BIG_PODS) {
            self.store.delete_pod(NAMESPACE, &name(number));
        }
        for number in 0..BIG_NAMESPACES {
            self.store.delete_namespace(&format!("{NAMESPACE}-{number}"));
        }
        self.store.delete_namespace(NAMESPACE);
    }
}

fn big_objects(store: &Store) {
    let text = |length| "x".repeat(length);
    for number in 0..BIG_PODS {
        let role = format!("storm-{number}");
        let pod = pod(number).role(&role);
        store.apply_pod(&pod.annotation("example.com/configuration", &text(BIG_POD)));
    }
    for number in 0..BIG_NAMESPACES {
        let namespace = NamespaceRecord::new(&format!("{NAMESPACE}-{number}"));
        let text = text(BIG_NAMESPACE);
        store.apply_namespace(&namespace.annotation("example.com/configuration", &text));
    }
}

fn pod(number: u64) -> PodRecord {
    let uid = format!("5702a000-0000-4000-8000-{number:012x}");
    PodRecord::scheduled(NAMESPACE, &name(number), &uid, NODE_NAME)
}

fn name(number: u64) -> String {
    format!("storm-{number}")
}
