//! The values of the maps that identify the openers of connections.

/// The key of `FLOWS`: the addresses and ports of a connection, and its opener's network namespace.
///
/// The namespace is part of the key because every namespace has the same loopback addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The cookie of the opener's network namespace (`bpf_get_netns_cookie`). 0, which no namespace has, is for the
    /// filter of SYNs, which can't see the opener's namespace. The last opener of a connection with these addresses and
    /// ports wrote that entry, so that it identifies nobody.
    pub netns: u64,
    /// The opener's address, IPv4 as v4-mapped, network order.
    pub source: [u8; 16],
    /// The listener's address, IPv4 as v4-mapped, network order.
    pub destination: [u8; 16],
    /// The opener's port, network order.
    pub source_port_be: u16,
    /// The listener's port, network order.
    pub destination_port_be: u16,
    /// Explicit padding, zero: the kernel hashes every byte.
    pub pad: u32,
}
const _: () = assert!(size_of::<FlowKey>() == 48);

/// The value of `FLOWS`: the opener of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opener {
    /// The leaf cgroup of the process that called connect (`bpf_get_current_cgroup_id`).
    pub cgroup: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// The socket's cookie. Only this socket's close removes the entry.
    pub socket: u64,
    /// 1 for a socket of the node's own network namespace, else 0.
    pub on_host: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Opener>() == 32);

/// The value of `CLIENTS`: the record of a redirected socket, from its connect to its close, for one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientRecord {
    /// The opener, which is published in `FLOWS`.
    pub opener: Opener,
    /// The key in `FLOWS` while the state is [`ClientRecord::BEGUN`] or [`ClientRecord::PUBLISHED`]. It is recorded because
    /// the kernel may change the source address between the handshake and the close (`ip_dynaddr`).
    pub key: FlowKey,
    /// The cgroup of the pod whose quota has the connection.
    pub pod: u64,
    /// The original destination, IPv4 as v4-mapped, for `getpeername`.
    pub asked: [u8; 16],
    /// The address that it was redirected to, IPv4 as v4-mapped. Connections to other addresses are not the agent's.
    pub destination: [u8; 16],
    /// The port that it was redirected to, in host order. A new agent may have another port.
    pub port: u16,
    /// 1 for a pod listener, 0 for a node listener.
    pub pod_listener: u16,
    /// [`ClientRecord::RECORDED`], [`ClientRecord::BEGUN`], [`ClientRecord::PUBLISHED`], or none of them.
    pub state: u32,
}
const _: () = assert!(size_of::<ClientRecord>() == 128);

impl ClientRecord {
    /// `state` after the connect hook, until the handshake begins.
    pub const RECORDED: u32 = 1;
    /// `state` once the SYN is sent: the connection is in its pod's quota, and the node listener's filter accepts the SYN.
    pub const BEGUN: u32 = 2;
    /// `state` while the connection is established and its opener is in `FLOWS`.
    pub const PUBLISHED: u32 = 3;
    /// `state` once the record was used. Later connects of the socket need a new record.
    pub const USED: u32 = 4;
}

/// The value of `CALLERS` and `PROCESSES`: the thread that called connect, and its process. It is for the audit alone, and
/// identifies nobody. It has maps of its own, so that the layout of the others, and with it the pins, stay as they are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallingProcess {
    /// The process's number in the initial PID namespace (`tgid`).
    pub process: u32,
    /// The thread's.
    pub thread: u32,
    /// The time of the connect, in nanoseconds of `CLOCK_BOOTTIME`, the clock of processes' start times.
    pub connected_ns: u64,
    /// The thread's name (`comm`), which ends at the first zero. The process may set it to anything.
    pub comm: [u8; 16],
}
const _: () = assert!(size_of::<CallingProcess>() == 32);

/// The value of `SANDBOXES`: a network namespace that is known to be a pod's. The key is its cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// The pod's cgroup. Only processes in it or below it count as the pod.
    pub pod: u64,
    /// The port of the pod listener at 127.0.0.1, in host order; 0: none.
    pub v4: u16,
    /// The same at ::1.
    pub v6: u16,
    /// Explicit padding, zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Sandbox>() == 16);

/// The value of `PODS`: a pod's connections. The key is the pod's cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCount {
    /// The open connections. Signed: an entry that is swept while a connection opens loses its count, so that the close
    /// leaves -1, which must not be a number above the quota.
    pub open: i64,
    /// The connections opened so far.
    pub opened: i64,
}
const _: () = assert!(size_of::<ConnectionCount>() == 16);

/// The key of `OBSERVED`: a caller of the IMDS, and the verdict that it would have got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sighting {
    /// The leaf cgroup of the caller.
    pub cgroup: u64,
    /// The number of a [`crate::counters::VerdictReason`].
    pub reason: u32,
    /// Explicit padding, zero: the kernel hashes every byte.
    pub pad: u32,
}
const _: () = assert!(size_of::<Sighting>() == 16);

/// The value of `OBSERVED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sightings {
    /// The number of sightings. Not exact: two processors may count at once.
    pub count: u64,
    /// The time of the last one, in nanoseconds of `CLOCK_MONOTONIC`.
    pub last_ns: u64,
}
const _: () = assert!(size_of::<Sightings>() == 16);

/// The v4-mapped form of an IPv4 address in network order, which the kernel's contexts have.
#[inline(always)]
#[must_use]
pub fn mapped(v4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = v4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]
    use super::{CallingProcess, ConnectionCount, FlowKey, Opener, Sandbox, Sighting, Sightings};
    // SAFETY: `repr(C)`, integers only, padding explicit (the size asserts above), any bytes are valid.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Opener {}
    // SAFETY: as above.
    unsafe impl aya::Pod for CallingProcess {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ConnectionCount {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Sandbox {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Sighting {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Sightings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::redirect::Target {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_equals_the_standard_librarys() {
        let address = core::net::Ipv4Addr::new(10, 77, 1, 2);
        assert_eq!(mapped(address.octets()), address.to_ipv6_mapped().octets());
    }
}
