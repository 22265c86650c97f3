//! Logs, the metrics registry, StatsD.
//!
//! Each part registers its own Prometheus metrics beside its code.

#[cfg(any(test, feature = "testing"))]
pub mod captured;
mod chain;
mod limit;
mod logs;
mod metrics;
mod statsd;
mod warnings;
mod words;

pub use self::{
    chain::Chain,
    limit::LogLimit,
    logs::{Format, InvalidLevel, Level, LogLevel, Logs},
    metrics::{ByLabel, ScrapedKind, register, register_scraped},
    statsd::{Statsd, StatsdFlush},
    warnings::{Warning, Warnings},
    words::{plain_char, times},
};
