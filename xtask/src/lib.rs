//! What the project's commands share: running programs, building the workspace, the toolchain for BPF, packages of `PyPI`,
//! the documents, and pages that commands write.

#![forbid(unsafe_code)]

pub mod build;
pub mod command;
pub mod helm;
pub mod markdown;
pub mod oci;
pub mod page;
pub mod prometheus;
pub mod python;
pub mod toolchain;
pub mod values;
