//! What pods see when something beside them fails: nothing, until what is held for them has really expired.
//!
//! `docs/faults.md` says which fault is tried where. Here the whole agent runs, over real HTTP: on loopback with
//! source-IP identity where no kernel is needed, on a lab node where it is.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod counts;
mod lab_node;
mod neighbours;
mod sts;

use std::time::Duration;

use lab::{
    eventually,
    fake::{
        kubernetes::{Kubernetes, PodRecord},
        sts::Sts,
    },
    loopback::{self, LoopbackNode},
};

/// Nothing here takes so long but a mistake.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(flags: &[&str], prepare: impl FnOnce(&Kubernetes, &Sts)) -> LoopbackNode {
    LoopbackNode::start(flags, prepare).unwrap()
}

fn pod(number: u16, role: &str) -> PodRecord {
    loopback::pod(number).role(role)
}
