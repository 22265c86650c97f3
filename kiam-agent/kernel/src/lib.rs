//! The agent's interface to the Linux kernel: interception, identity, and the pods' network namespaces.
//!
//! Only this crate uses aya and netlink, and only this crate of the agent has `unsafe`.

mod error;
pub mod guard;
pub mod identity;
pub mod intercept;
pub mod keeper;
pub mod pins;
pub mod preflight;
pub mod realtime;
pub mod sandboxes;
pub mod selftest;
pub mod sys;
