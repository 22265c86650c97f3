//! Loads, attaches, pins and reads the kernel programs.
//!
//! Everything is pinned below `<bpffs>/v<layout>/`, so that the interception outlives the agent: without an agent, pods'
//! connects to the IMDS are denied. A later agent adopts the maps and replaces the programs in place. Only
//! `uninstall` and `--detach-on-exit` detach them.

mod ancestors;
mod attach;
mod attached;
mod config;
mod flows;
mod lease;
mod loader;
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
mod renewal;
mod rewriter;
mod sandbox_table;
mod shortage;
mod snapshot;
mod uninstall;

pub(crate) use self::{ancestors::above, config::check, loading::verify_all, older::start_time};
pub use self::{
    attached::InterceptedSince,
    config::{Config, HostNetworkPods, ListenerPath, Mode},
    flows::{FlowEntry, Flows},
    lease::{Lease, last_renewed},
    marks::Marks,
    metrics::{RestoredMetrics, Verdicts},
    namespace::own_namespace,
    observations::{Observation, Observations},
    older::{OlderPods, OlderSearch},
    open_pins::Drift,
    own_pod::{may_hand_over, prepare, prepare_once_possible},
    programs::{Interception, InterceptionParts, KernelLog},
    reattach::RestoreOutcome,
    renewal::keep_renewed,
    rewriter::Rewriter,
    sandbox_table::SandboxTable,
    shortage::Shortage,
    snapshot::Snapshot,
    uninstall::{Removal, UninstallError, detach, is_installed, remove_all, uninstall},
};
pub use crate::error::Error;
