//! What a pod's request passes through: accept loop, metadata service, audit.
//!
//! A crate has one level of optimisation, and generic code that of the crate that instantiates it: here.

#![forbid(unsafe_code)]

pub mod audit;
pub mod imds;
pub mod serve;

use std::sync::Arc;

use futures::future::BoxFuture;
use kiam_core::lifecycle::Drain;
use tokio::sync::mpsc;

/// Answers pods at `listeners` until the drain begins, and then finishes begun requests.
pub fn answer(
    listeners: mpsc::Receiver<serve::Listener>,
    service: imds::Service,
    config: serve::Config,
    metrics: serve::Metrics,
    drain: Drain,
) -> BoxFuture<'static, ()> {
    Box::pin(serve::run(listeners, Arc::new(service), config, metrics, drain))
}
