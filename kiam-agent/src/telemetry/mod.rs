//! Logs, the metrics registry, StatsD.
//!
//! Each part registers its own Prometheus metrics beside its code; here is only what they share.

mod logs;
mod statsd;

pub use self::{
    logs::{Format, InvalidLevel, Level, LogLevel, Logs},
    statsd::{Statsd, StatsdFlush},
};
