//! kiam-agent: gives each pod on a Kubernetes node the credentials of its own AWS IAM role.
//!
//! The modules form layers; `ARCHITECTURE.md` has the table and a test checks it.

pub mod admin;
pub mod app;
pub mod blocking;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod credentials;
pub mod handover;
pub mod identity;
pub mod imds;
pub mod intercept;
pub mod lifecycle;
pub mod pods;
pub mod policy;
pub mod proxy;
pub mod realtime;
pub mod role;
pub mod sandboxes;
pub mod secret;
pub mod serve;
pub mod sts;
pub mod telemetry;
