//! What `cargo xtask` can do, one file per command.

pub(crate) mod acceptance;
pub(crate) mod bench;
pub(crate) mod build;
pub(crate) mod command;
pub(crate) mod demo;
pub(crate) mod kernels;
pub(crate) mod kubernetes;
pub(crate) mod simulate;
pub(crate) mod test;
pub(crate) mod tidy;
pub(crate) mod toolchain;
