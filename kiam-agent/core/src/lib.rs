//! What the agent decides: who may have which role, and which credentials are asked for, when.
//!
//! Nothing here speaks to the kernel, to Kubernetes or to AWS: those are behind traits that this crate defines and
//! the crates above it implement, so that all of it runs in virtual time in tests and in the simulation of a fleet.

#![forbid(unsafe_code)]

pub mod blocking;
pub mod clock;
pub mod credentials;
pub mod lifecycle;
pub mod pods;
pub mod policy;
pub mod role;
pub mod secret;
pub mod telemetry;
