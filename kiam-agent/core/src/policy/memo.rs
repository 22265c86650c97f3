//! Values computed from texts, so that they are computed once and not at every decision.

use std::{
    collections::HashMap,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::blocking::in_place;

/// Bytes of an entry besides its text and its weight.
const OVERHEAD: usize = 128;

/// A bounded cache of the value computed from each text, errors included.
///
/// A full cache rejects nothing: entries that were not used lately make room, and are computed again when needed.
#[derive(Debug)]
pub(super) struct Memo<T> {
    made: Mutex<Generations<T>>,
    /// Locked while a slow value is computed.
    making: Mutex<()>,
    /// The most memory that it takes, in bytes: annotations must not fill the agent's memory.
    room: usize,
}

/// Entries in two generations, so that those in constant use outlive a crowd of others.
#[derive(Debug)]
struct Generations<T> {
    young: HashMap<Box<str>, T>,
    old: HashMap<Box<str>, T>,
    /// The cost of the young entries.
    cost: usize,
}

/// A value that knows how many bytes it takes on the heap.
pub(super) trait Weigh {
    fn weight(&self) -> usize;
}

// === impl Memo ===

impl<T: Clone + Weigh> Memo<T> {
    /// An empty cache that takes at most `room` bytes.
    pub(super) fn new(room: usize) -> Self {
        let (young, old) = (HashMap::new(), HashMap::new());
        Self {
            made: Mutex::new(Generations { young, old, cost: 0 }),
            making: Mutex::default(),
            room,
        }
    }

    /// The value of `text`, computed by `make` unless it is cached. Threads do not wait for each other's `make`.
    pub(super) fn get(&self, text: &str, make: impl FnOnce() -> T) -> T {
        if let Some(known) = self.known(text) {
            return known;
        }
        let made = make();
        self.keep(&mut self.made(), text, made.clone());
        made
    }

    /// As [`Memo::get`], for a `make` that takes long: values are computed one after the other, each once, and only tasks
    /// that need the value wait for it.
    pub(super) fn get_slowly(&self, text: &str, make: impl FnOnce() -> T) -> T {
        self.known(text).unwrap_or_else(|| {
            in_place(|| {
                let _turn = self.making.lock().unwrap_or_else(PoisonError::into_inner);
                self.get(text, make)
            })
        })
    }

    fn known(&self, text: &str) -> Option<T> {
        let mut made = self.made();
        if let Some(known) = made.young.get(text) {
            return Some(known.clone());
        }
        let known = made.old.remove(text)?;
        self.keep(&mut made, text, known.clone());
        Some(known)
    }

    fn keep(&self, made: &mut Generations<T>, text: &str, what: T) {
        let (cost, half) = (OVERHEAD + text.len() + what.weight(), self.room / 2);
        if cost > half {
            return;
        }
        if made.cost + cost > half {
            made.old = mem::take(&mut made.young);
            made.cost = 0;
        }
        // If another thread has added it meanwhile, it is counted twice for a while.
        made.cost += cost;
        made.young.insert(text.into(), what);
    }

    /// The weight of all entries.
    #[cfg(test)]
    pub(super) fn total(&self, weight: impl Fn(&T) -> usize) -> usize {
        let made = self.made();
        made.young.iter().chain(&made.old).map(|(text, what)| text.len() + weight(what)).sum()
    }

    fn made(&self) -> MutexGuard<'_, Generations<T>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Weigh for bool {
    fn weight(&self) -> usize {
        0
    }
}

impl Weigh for Option<usize> {
    fn weight(&self) -> usize {
        0
    }
}

impl<T: Weigh, E> Weigh for Result<T, E> {
    fn weight(&self) -> usize {
        /// A message quotes a text or two, as far as they are shown.
        const MISTAKE: usize = 1024;
        self.as_ref().map_or(MISTAKE, Weigh::weight)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        time::Duration,
    };

    use super::*;

    const ROOM: usize = 64 * 1024;
    /// Longer than a slow machine takes.
    const LIMIT: Duration = Duration::from_secs(60);

    fn taken(kept: &Memo<bool>) -> usize {
        let made = kept.made.lock().unwrap();
        made.young.keys().chain(made.old.keys()).map(|text| OVERHEAD + text.len()).sum()
    }

    #[test]
    fn each_text_is_made_once_and_memory_is_bounded() {
        let kept = Memo::new(ROOM);
        assert_eq!((kept.get("a", || true), kept.get("a", || false)), (true, true));
        for n in 0..10_000 {
            kept.get(&n.to_string(), || true);
            assert!(taken(&kept) <= ROOM);
        }
        for n in 0..1_000 {
            kept.get(&format!("{n:03}{}", "x".repeat(10_000)), || true);
            assert!(taken(&kept) <= ROOM);
        }
        let longer = "x".repeat(ROOM / 2);
        assert_eq!((kept.get(&longer, || true), kept.get(&longer, || false)), (true, false));
    }

    #[test]
    fn what_takes_long_is_made_once_and_keeps_no_other_task_waiting() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (kept, made) = (Arc::new(Memo::new(ROOM)), Arc::new(AtomicUsize::new(0)));
        let (go_on, wait) = mpsc::channel();
        let wait = Arc::new(Mutex::new(wait));
        let get = || {
            let (kept, made, wait) = (kept.clone(), made.clone(), wait.clone());
            runtime.spawn(async move {
                kept.get_slowly("a", || {
                    made.fetch_add(1, Ordering::Relaxed);
                    wait.lock().unwrap().recv_timeout(LIMIT).unwrap();
                    true
                })
            })
        };
        let slow = [get(), get()];
        // The only thread of the runtime goes on while something is made.
        let other = runtime.block_on(runtime.spawn(async move { go_on.send(()) }));
        assert!(other.unwrap().is_ok());
        for task in slow {
            assert!(runtime.block_on(task).unwrap());
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_crowd_does_not_push_out_what_is_asked_for_all_the_time() {
        let (kept, made) = (Memo::new(ROOM), Cell::new(0));
        for n in 0..100_000 {
            kept.get(&n.to_string(), || true);
            if n % 100 == 0 {
                kept.get("usual", || {
                    made.set(made.get() + 1);
                    true
                });
            }
        }
        assert_eq!(made.get(), 1);
    }
}
