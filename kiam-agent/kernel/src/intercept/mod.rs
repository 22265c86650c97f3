//! Loads, attaches, pins and reads the kernel programs.
//!
//! Everything is pinned below `<bpffs>/v<layout>/`, so that what the kernel does outlives the agent: with
//! no agent, pods' connects to the IMDS are denied. A later agent takes the maps as they are and replaces
//! the programs in place; at no instant are they detached.

mod ancestors;
mod attach;
mod attached;
mod config;
mod flows;
mod lease;
mod loading;
mod marks;
mod metrics;
mod namespace;
mod observations;
mod older;
mod open_pins;
mod own_pod;
mod programs;
mod reattach;
mod rewriter;
mod sandbox_table;
mod uninstall;

pub use self::{
    attached::since_boot,
    config::{Config, HostNetworkPods, ListenerPath, Mode},
    flows::{FlowEntry, Flows},
    lease::{Lease, last_renewed},
    marks::Marks,
    metrics::{RestoredMetrics, Verdicts},
    namespace::own_namespace,
    observations::{Observation, Observations},
    older::{OlderPods, older_pods},
    open_pins::Drift,
    own_pod::{may_hand_over, prepare},
    programs::{Interception, InterceptionParts, KernelLog},
    reattach::RestoreOutcome,
    rewriter::Rewriter,
    sandbox_table::SandboxTable,
    uninstall::{detach, is_installed, uninstall},
};
pub use crate::error::Error;
