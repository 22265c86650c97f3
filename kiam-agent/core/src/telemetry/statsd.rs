//! StatsD, under kiam v1's names, for dashboards that exist already.
//!
//! Lines are collected and sent as UDP datagrams when one is full and at every interval. Nothing waits
//! for the receiver, and a receiver that is away costs nothing but the lines.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use cadence::{BufferedUdpMetricSink, CountedExt, Gauged, StatsdClient, Timed};
use tokio::time::MissedTickBehavior;

use crate::lifecycle::Drain;

/// In front of every name, as in kiam.
const PREFIX: &str = "kiam";

/// Sends counters, timings and gauges to a StatsD server, or does nothing where there is none.
#[derive(Clone, Debug)]
pub struct Statsd(Option<Arc<StatsdClient>>);

/// Sends what has been collected, at every interval; run it as a task.
#[derive(Debug)]
pub struct StatsdFlush {
    client: Arc<StatsdClient>,
    interval: Duration,
}

// === impl Statsd ===

impl Statsd {
    /// One that does nothing.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// One that sends to `server`, at the latest after each `interval` by the task that is returned too.
    ///
    /// # Errors
    ///
    /// The system's, when it gives no UDP socket.
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

    /// Counts one.
    pub fn incr(&self, name: &str) {
        if let Some(client) = &self.0 {
            lost(client.incr(name));
        }
    }

    /// How long something took, in whole milliseconds as StatsD has it.
    pub fn timing(&self, name: &str, took: Duration) {
        if let Some(client) = &self.0 {
            lost(client.time(name, took));
        }
    }

    /// The value of something now.
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

/// StatsD is sent and forgotten: a line that can't be sent is told at `debug` only, for a receiver that
/// is away would fill the log.
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
