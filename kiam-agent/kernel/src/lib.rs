//! What the agent asks of the Linux kernel: interception, identity, and the pods' network namespaces.
//!
//! The only crate that names aya and netlink, and the only one of the agent's with `unsafe`.

mod error;
pub mod guard;
pub mod identity;
pub mod intercept;
pub mod keeper;
pub mod pins;
pub mod realtime;
pub mod sandboxes;
pub mod selftest;
pub mod sys;
