//! Small servers that stand in for the Kubernetes API, AWS STS and the EC2 metadata service, over real HTTP.
//!
//! Each runs on a thread and a runtime of its own, so that a test's paused time does not stop it, and is steered and
//! asked by plain calls from any thread.

pub mod aws;
mod fault;
mod http;
pub mod imds;
pub mod kubernetes;
mod packets;
mod proxy;
pub mod sts;
mod tls;
mod web_token;

pub use self::{
    fault::{Fault, Faults, Injected},
    http::Place,
    proxy::{Proxy, ProxyRequest},
    tls::TlsFront,
};
