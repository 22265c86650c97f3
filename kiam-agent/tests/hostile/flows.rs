//! The kernel's map of connections, as an operator can read and fill it.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use kiam_common::client::{FlowKey, Opener};
use lab::Lab;

/// Between two looks for places that have become free.
const PAUSE: Duration = Duration::from_millis(1);

type Flows = HashMap<MapData, FlowKey, Opener>;

fn open(lab: &Lab) -> Flows {
    let mut layouts = fs::read_dir(lab.pins()).unwrap().map(|entry| entry.unwrap().path());
    let pin = layouts.find_map(|layout| Some(layout.join("FLOWS")).filter(|pin| pin.exists()));
    Map::HashMap(MapData::from_pin(pin.unwrap()).unwrap()).try_into().unwrap()
}

/// How many connections the map has, those under namespace 0 counted once more.
pub(crate) fn count(lab: &Lab) -> usize {
    open(lab).keys().map_while(Result::ok).count()
}

/// A map that is kept full until this is dropped.
pub(crate) struct FullMap {
    ended: Arc<AtomicBool>,
    filling: Option<JoinHandle<()>>,
    filled: u64,
}

// === impl FullMap ===

impl FullMap {
    /// Fills it with entries of nobody, and every place that becomes free too.
    pub(crate) fn fill(lab: &Lab) -> Self {
        let mut flows = open(lab);
        let filled = fill(&mut flows, 0);
        let ended = Arc::new(AtomicBool::new(false));
        let own_ended = Arc::clone(&ended);
        let filling = thread::spawn(move || {
            let mut all = filled;
            while !own_ended.load(Ordering::Relaxed) {
                all = fill(&mut flows, all);
                thread::sleep(PAUSE);
            }
            for number in 0..all {
                // What is gone is as good.
                let _ = flows.remove(&junk(number));
            }
        });
        Self { ended, filling: Some(filling), filled }
    }

    pub(crate) fn entries(&self) -> u64 {
        self.filled
    }
}

impl Drop for FullMap {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.filling.take().map(JoinHandle::join);
    }
}

/// Inserts entries from this number on until there is no room; the next number.
fn fill(flows: &mut Flows, mut next: u64) -> u64 {
    while flows.insert(junk(next), Opener::default(), 0).is_ok() {
        next += 1;
    }
    next
}

/// Of a namespace that there is none of.
fn junk(number: u64) -> FlowKey {
    FlowKey {
        netns: u64::MAX - number,
        source: [0; 16],
        destination: [0; 16],
        source_port_be: 0,
        destination_port_be: 0,
        pad: 0,
    }
}
