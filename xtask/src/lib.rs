//! What the project's commands share: running programs, building the workspace, and the toolchain for BPF.

#![forbid(unsafe_code)]

pub mod build;
pub mod command;
pub mod oci;
pub mod toolchain;
