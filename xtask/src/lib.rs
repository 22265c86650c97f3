//! The one-node lab: what a Kubernetes node is to the agent, made of network namespaces, cgroups and small real servers.

pub mod demo;
pub mod lab;
pub mod pod_client;
