//! The agent's decisions: which pod may have which role, and when credentials are requested.
//!
//! Nothing here speaks to the kernel, Kubernetes or AWS. These are behind traits that the crates above implement, so
//! that this crate runs in virtual time in tests and in the simulation of a fleet.

#![forbid(unsafe_code)]

pub mod blocking;
pub mod clock;
pub mod credentials;
pub mod lifecycle;
pub mod maps;
pub mod names;
pub mod pods;
pub mod policy;
pub mod preflight;
pub mod rate;
pub mod role;
pub mod secret;
pub mod telemetry;
pub mod ticks;
