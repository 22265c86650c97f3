//! Logs, the metrics registry, StatsD.
