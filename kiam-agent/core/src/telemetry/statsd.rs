//! StatsD, under kiam v1's names, for dashboards that exist already.
//!
//! Lines are collected, and sent as UDP datagrams when one is full and at every interval. Nothing waits for the
//! receiver. If it is unavailable, only the lines are lost.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use cadence::{BufferedUdpMetricSink, CountedExt, Gauged, StatsdClient, Timed};
use tokio::time::MissedTickBehavior;

use crate::lifecycle::Drain;

/// The prefix of every name, as in kiam.
const PREFIX: &str = "kiam";

/// A client that sends counters, timings and gauges to a StatsD server, or does nothing where there is none.
#[derive(Clone, Debug)]
pub struct Statsd(Option<Arc<StatsdClient>>);

/// The task that sends the collected lines at every interval.
#[derive(Debug)]
pub struct StatsdFlush {
    client: Arc<StatsdClient>,
    interval: Duration,
}

// === impl Statsd ===

impl Statsd {
    /// A client that does nothing.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// A client of `server`, and the task that flushes it at each `interval`.
    ///
    /// # Errors
    ///
    /// The system's, for the UDP socket.
    pub fn to(server: SocketAddr, interval: Duration) -> io::Result<(Self, StatsdFlush)> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.set_nonblocking(true)?;
        let sink = BufferedUdpMetricSink::from(server, socket).map_err(io::Error::other)?;
        let client = Arc::new(StatsdClient::builder(PREFIX, sink).build());
        Ok((Self(Some(client.clone())), StatsdFlush { client, interval }))
    }

    /// Increments a counter.
    pub fn incr(&self, name: &str) {
        if let Some(client) = &self.0 {
            lost(client.incr(name));
        }
    }

    /// Sends a duration, in whole milliseconds as StatsD has it.
    pub fn timing(&self, name: &str, took: Duration) {
        if let Some(client) = &self.0 {
            lost(client.time(name, took));
        }
    }

    /// Sends a gauge's value.
    pub fn gauge(&self, name: &str, value: u64) {
        if let Some(client) = &self.0 {
            lost(client.gauge(name, value));
        }
    }
}

// === impl StatsdFlush ===

impl StatsdFlush {
    /// Flushes until the drain begins, and once more then.
    pub async fn run(self, mut drain: Drain) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => lost(self.client.flush()),
                () = drain.started() => break,
            }
        }
        lost(self.client.flush());
    }
}

/// Logs a line that can't be sent, at `debug` only: otherwise an unavailable receiver would fill the log.
fn lost<T>(sent: Result<T, cadence::MetricError>) {
    if let Err(error) = sent {
        tracing::debug!(%error, "StatsD metric not sent");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::drain;

    #[tokio::test]
    async fn server_receives_lines_with_kiams_prefix_after_an_interval() {
        let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let interval = Duration::from_millis(20);
        let (statsd, flush) = Statsd::to(server.local_addr().unwrap(), interval).unwrap();
        let (signal, drain) = drain();
        let task = tokio::spawn(flush.run(drain));
        statsd.incr("credentialsCache.cacheHit");
        statsd.timing("aws.assumeRole", Duration::from_millis(12));
        statsd.gauge("pods", 3);
        let mut lines = Vec::new();
        while lines.len() < 3 {
            let mut datagram = [0; 1500];
            let received = server.recv(&mut datagram);
            let length =
                tokio::time::timeout(Duration::from_secs(5), received).await.unwrap().unwrap();
            let text = String::from_utf8(datagram[..length].to_vec()).unwrap();
            lines.extend(text.lines().map(str::to_owned));
        }
        assert_eq!(
            lines,
            ["kiam.credentialsCache.cacheHit:1|c", "kiam.aws.assumeRole:12|ms", "kiam.pods:3|g"]
        );
        signal.start();
        task.await.unwrap();
    }
}
