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
mod hold;
mod lease;
mod loading;
mod marks;
mod metrics;
mod observed;
mod older;
mod own_pod;
mod programs;
mod reattach;
mod renewal;
mod rewriter;
mod sandbox_table;
mod shortage;
mod uninstall;

pub use self::{
    attached::since_boot,
    config::{Config, HostNetworkPods, Mode, Path},
    flows::{FlowEntry, Flows},
    hold::Losses,
    lease::{Lease, last_renewed},
    marks::Marks,
    metrics::{RestoredMetrics, Verdicts},
    observed::{Observation, Observed},
    older::{OlderPods, older_pods},
    own_pod::{may_hand_over, prepare},
    programs::{Interception, KernelLog, Parts},
    reattach::Restored,
    renewal::keep_renewed,
    rewriter::Rewriter,
    sandbox_table::SandboxTable,
    shortage::Shortage,
    uninstall::{Removal, UninstallError, detach, is_installed, remove_all, uninstall},
};
pub use crate::error::Error;
