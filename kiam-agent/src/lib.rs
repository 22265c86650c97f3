//! kiam-agent: gives each pod on a Kubernetes node the credentials of its own AWS IAM role.
//!
//! This crate has the edges, where Kubernetes, AWS, operators and the next agent are spoken to, and the wiring. Pods are
//! answered in `kiam-requests`, what is decided is in `kiam-core`, and what is asked of the kernel in `kiam-kernel`. `ARCHITECTURE.md` has the table of modules.

#![forbid(unsafe_code)]

pub mod admin;
pub mod app;
pub mod cluster;
pub mod config;
pub mod ctl;
pub mod explain;
pub mod handover;
pub mod migrate;
pub mod observe;
pub mod older_pods;
pub mod peers;
pub mod pod_listeners;
pub mod preflight;
mod printable;
pub mod proxy;
pub mod sts;
mod transport;
pub mod uninstall;
