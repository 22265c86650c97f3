//! The limits and deadlines of connections.

use std::time::Duration;

use super::POD_RATE;
use kiam_core::rate::Rate;

/// Limits and deadlines of connections.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The most open connections in all.
    pub connections: usize,
    /// Open files that are reserved for other uses than connections.
    pub other_files: usize,
    /// The most open connections of one pod, or of one address where only that is known; far fewer once half of all are open.
    /// It is less than the kernel's quota (`POD_QUOTA`), beyond which connects are denied, while here an idle connection ends
    /// for a new one.
    pub connections_per_pod: usize,
    /// The most open connections of callers that are not pods, together.
    pub connections_of_strangers: usize,
    /// The rate of new connections of one pod. Connections beyond that wait in the queue of the pod listener, and are closed at
    /// the node listener.
    pub new_connections: Rate,
    /// The rate of requests of one pod. Requests beyond that get 503.
    pub requests: Rate,
    /// The deadline of a request's head, counted from the last answer.
    pub header_deadline: Duration,
    /// The deadline of a request's head for a caller that is not a pod.
    pub stranger_deadline: Duration,
    /// How long a client may leave sent data unread.
    pub unread_deadline: Duration,
    /// How long connections are accepted after the drain began: connections that were redirected just before are still
    /// entering the queue, and closing the queue would reset them. Until an agent that took over has published a listener of its
    /// own in a pod, connections still come, too. Unused if that agent has the queue.
    pub late_accepts: Duration,
    /// How long an open connection may bring further requests after the drain began. Each answer closes the connection.
    pub last_requests: Duration,
    /// How long begun requests may take once no connection is accepted.
    pub drain_deadline: Duration,
    /// The deadline of the connect for a connection that is passed on.
    pub relay_connect: Duration,
    /// How long a connection that is passed on may be idle.
    pub relay_idle: Duration,
    /// The longest life of a connection that is passed on.
    pub relay_total: Duration,
}

// === impl Config ===

impl Default for Config {
    fn default() -> Self {
        Self {
            connections: 8192,
            other_files: 256,
            connections_per_pod: 192,
            connections_of_strangers: 256,
            new_connections: POD_RATE,
            requests: POD_RATE,
            header_deadline: Duration::from_secs(60),
            stranger_deadline: Duration::from_secs(5),
            unread_deadline: Duration::from_secs(30),
            late_accepts: Duration::from_millis(500),
            last_requests: Duration::from_secs(1),
            drain_deadline: Duration::from_secs(5),
            relay_connect: Duration::from_secs(1),
            relay_idle: Duration::from_secs(60),
            relay_total: Duration::from_secs(3600),
        }
    }
}
