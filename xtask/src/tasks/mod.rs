//! What `cargo xtask` can do, one file per command.

pub(crate) mod build_ebpf;
pub(crate) mod command;
pub(crate) mod toolchain;
