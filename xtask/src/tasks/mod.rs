//! What `cargo xtask` can do, one file per command.

pub(crate) mod book;
pub(crate) mod chart;
pub(crate) mod image;
pub(crate) mod kernels;
pub(crate) mod kubernetes;
pub(crate) mod lab;
pub(crate) mod simulate;
pub(crate) mod test;
pub(crate) mod tidy;
