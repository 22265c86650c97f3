//! The kernel's map of connections, as an operator can read and fill it.

use std::fs;

use aya::maps::{HashMap, Map, MapData};
use kiam_common::client::{Client, FlowKey};
use xtask::lab::Lab;

type Flows = HashMap<MapData, FlowKey, Client>;

fn open(lab: &Lab) -> Flows {
    let mut layouts = fs::read_dir(lab.pins()).unwrap().map(|entry| entry.unwrap().path());
    let pin = layouts.find_map(|layout| Some(layout.join("FLOWS")).filter(|pin| pin.exists()));
    Map::HashMap(MapData::from_pin(pin.unwrap()).unwrap()).try_into().unwrap()
}

/// How many connections the map has, those under namespace 0 counted once more.
pub(crate) fn count(lab: &Lab) -> usize {
    open(lab).keys().map_while(Result::ok).count()
}

/// A map that is full, until it is dropped.
pub(crate) struct Full {
    flows: Flows,
    filled: u64,
}

// === impl Full ===

impl Full {
    /// Fills it with entries of nobody.
    pub(crate) fn fill(lab: &Lab) -> Self {
        let mut flows = open(lab);
        let mut filled = 0;
        while flows.insert(junk(filled), Client::default(), 0).is_ok() {
            filled += 1;
        }
        Self { flows, filled }
    }

    pub(crate) fn entries(&self) -> u64 {
        self.filled
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        for number in 0..self.filled {
            // What is gone is as good.
            let _ = self.flows.remove(&junk(number));
        }
    }
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
