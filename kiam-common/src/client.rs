//! The identity maps: who opened a connection, as the kernel saw it.

/// `FLOWS` key: a connection as both ends see it, in the network namespace it was opened in.
///
/// The namespace is part of it because loopback addresses repeat in every one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The opener's network namespace cookie (`bpf_get_netns_cookie`). 0, which no namespace has: for the filter of
    /// SYNs, which can't see the opener's. Whoever opened a connection with these ends last wrote that entry, so it
    /// never tells whose a connection is.
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

/// `FLOWS` value: who opened a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opener {
    /// Leaf cgroup of the process that called connect (`bpf_get_current_cgroup_id`).
    pub cgroup: u64,
    /// Its network namespace's cookie.
    pub netns: u64,
    /// The socket's cookie: only this socket's close removes the entry.
    pub socket: u64,
    /// 1 for a socket of the node's own network namespace.
    pub on_host: u32,
    /// Explicit padding, zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Opener>() == 32);

/// `CLIENTS` value: a redirected socket, from its connect to its close. It is good for one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientRecord {
    /// What is published.
    pub opener: Opener,
    /// Under which key, while the state is [`ClientRecord::BEGUN`] or [`ClientRecord::PUBLISHED`]. The kernel may change the source
    /// address between the handshake and the close (`ip_dynaddr`), so the key is kept.
    pub key: FlowKey,
    /// The cgroup that the connection counts for: its pod's.
    pub pod: u64,
    /// The destination that was asked, IPv4 as v4-mapped; for `getpeername`.
    pub asked: [u8; 16],
    /// The address it was redirected to, IPv4 as v4-mapped: a connection elsewhere is not the agent's.
    pub destination: [u8; 16],
    /// The port it was redirected to, host order: an agent that takes over may have another port than the one
    /// that this was meant for.
    pub port: u16,
    /// 1 for a listener inside its own network namespace, 0 for one of the node's.
    pub pod_listener: u16,
    /// [`ClientRecord::RECORDED`], [`ClientRecord::BEGUN`], [`ClientRecord::PUBLISHED`], or none of them.
    pub state: u32,
}
const _: () = assert!(size_of::<ClientRecord>() == 128);

impl ClientRecord {
    /// `state` after the connect hook, until the handshake begins.
    pub const RECORDED: u32 = 1;
    /// `state` once the SYN is on its way: the connection counts for its pod, and at the node's listener the filter of
    /// SYNs lets it in.
    pub const BEGUN: u32 = 2;
    /// `state` while the connection stands, and `FLOWS` tells whose it is.
    pub const PUBLISHED: u32 = 3;
    /// `state` once the record was used: what the socket connects to later needs a new one.
    pub const USED: u32 = 4;
}

/// `SANDBOXES` value, by network namespace cookie: a namespace that is known to be a pod's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// The pod's cgroup: only processes in it or below it speak for the pod.
    pub pod: u64,
    /// The port of the agent's listener at 127.0.0.1 in the namespace, host order; 0: none.
    pub v4: u16,
    /// The same at ::1.
    pub v6: u16,
    /// Explicit padding, zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Sandbox>() == 16);

/// `PODS` value, by the pod's cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCount {
    /// Connections that are open now. Signed: an entry that is swept while a connection opens loses that
    /// one's count, and its close must leave -1 here, not a number above every quota.
    pub open: i64,
    /// How many were opened in all.
    pub opened: i64,
}
const _: () = assert!(size_of::<ConnectionCount>() == 16);

/// `OBSERVED` key: who asked for the IMDS, and what would have become of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sighting {
    /// Leaf cgroup of the process that asked.
    pub cgroup: u64,
    /// A [`crate::counters::VerdictReason`], as its number.
    pub reason: u32,
    /// Explicit padding, zero: the kernel hashes every byte.
    pub pad: u32,
}
const _: () = assert!(size_of::<Sighting>() == 16);

/// `OBSERVED` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sightings {
    /// How often. Not exact: two processors may count at once.
    pub count: u64,
    /// When the last was, nanoseconds of `CLOCK_MONOTONIC`.
    pub last_ns: u64,
}
const _: () = assert!(size_of::<Sightings>() == 16);

/// An IPv4 address (network order, as the kernel's contexts hold it) in its v4-mapped form.
#[inline(always)]
#[must_use]
pub fn mapped(v4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = v4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]
    use super::{ConnectionCount, FlowKey, Opener, Sandbox, Sighting, Sightings};
    // SAFETY: `repr(C)`, integers only, padding explicit (the size asserts above), any bytes are valid.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Opener {}
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
    fn mapped_is_what_std_calls_mapped() {
        let address = core::net::Ipv4Addr::new(10, 77, 1, 2);
        assert_eq!(mapped(address.octets()), address.to_ipv6_mapped().octets());
    }
}
