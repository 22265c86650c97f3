//! Decides the verdict of a connect or a datagram.
//!
//! Only traffic to the instance metadata service and to the agent is judged. It is denied in case of doubt.

use core::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{client::Sandbox, counters::VerdictReason};

/// `169.254.169.254`, the instance metadata service by IPv4.
pub const IMDS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// `fd00:ec2::254`, the same by IPv6 on Nitro instances.
pub const IMDS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The port of the instance metadata service.
pub const IMDS_PORT: u16 = 80;

/// The address that the self-test's program rewrites to the IMDS's, to prove that the guard denies such connections. It is
/// of TEST-NET-1 (RFC 5737), so that nobody has it.
pub const REWRITTEN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);

/// The listeners for redirected connections, at most one of each family. Port 0: none of that family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// IPv4 address in network order, as octets.
    pub v4: [u8; 4],
    /// IPv6 address in network order, as octets.
    pub v6: [u8; 16],
    /// Port of the IPv4 listener, host order.
    pub v4_port: u16,
    /// Port of the IPv6 listener, host order.
    pub v6_port: u16,
}
const _: () = assert!(size_of::<Target>() == 24);

/// The agent's ports on the node, in host order; 0: none. Pods on the node's network can't bind them.
pub type AgentPorts = [u16; 4];

/// The properties of a caller that decide its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Whether its traffic passes: of an exempt cgroup, or of a hostNetwork pod with `--host-network-pods=pass`.
    pub exempt: bool,
    /// Whether the agent renewed its lease within [`crate::LEASE_NS`].
    pub leased: bool,
    /// Whether its socket is a stream, not a datagram socket.
    pub stream: bool,
}

/// The verdict of a connect or a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass unchanged: other traffic, or an exempt caller's.
    Pass(VerdictReason),
    /// Redirect it to a listener of the agent.
    Redirect(Destination),
    /// Deny it with `EPERM`.
    Deny(VerdictReason),
}

/// A listener of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An IPv4 address with a port in host order.
    V4(Ipv4Addr, u16),
    /// An IPv6 address, possibly v4-mapped, with a port in host order.
    V6(Ipv6Addr, u16),
}

// === impl Target ===

impl Target {
    /// The node listeners at these addresses.
    #[must_use]
    pub fn node_listeners(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let mut target = Self::default();
        for address in addresses {
            match address {
                SocketAddr::V4(v4) => {
                    (target.v4, target.v4_port) = (v4.ip().octets(), v4.port());
                }
                SocketAddr::V6(v6) => {
                    (target.v6, target.v6_port) = (v6.ip().octets(), v6.port());
                }
            }
        }
        target
    }

    /// The pod listeners in a pod's own network namespace, at 127.0.0.1 and ::1.
    #[inline(always)]
    #[must_use]
    pub fn pod_listeners(sandbox: Sandbox) -> Self {
        Self {
            v4: Ipv4Addr::LOCALHOST.octets(),
            v4_port: sandbox.v4,
            v6: Ipv6Addr::LOCALHOST.octets(),
            v6_port: sandbox.v6,
        }
    }

    /// Whether this is the agent's IPv4 listener; `port` in host order.
    #[inline(always)]
    #[must_use]
    pub fn is_v4(&self, address: Ipv4Addr, port: u16) -> bool {
        self.v4_port != 0 && port == self.v4_port && address.octets() == self.v4
    }

    /// Whether this is one of the agent's listeners, the IPv4 one in v4-mapped form; `port` in host order.
    #[inline(always)]
    #[must_use]
    pub fn is_v6(&self, address: Ipv6Addr, port: u16) -> bool {
        let mapped = Ipv4Addr::from_octets(self.v4).to_ipv6_mapped();
        (self.v6_port != 0 && port == self.v6_port && address.octets() == self.v6)
            || (self.v4_port != 0 && port == self.v4_port && address.octets() == mapped.octets())
    }
}

/// Whether `port` (host order) is one of the agent's.
#[inline(always)]
#[must_use]
pub fn is_agent_port(port: u16, ports: &AgentPorts) -> bool {
    let [a, b, c, d] = *ports;
    port != 0 && (port == a || port == b || port == c || port == d)
}

impl Destination {
    /// The port, in host order.
    #[inline(always)]
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::V4(_, port) | Self::V6(_, port) => port,
        }
    }
}

/// Whether `address` is that of the instance metadata service.
#[inline(always)]
#[must_use]
pub fn is_imds_v4(address: Ipv4Addr) -> bool {
    address.octets() == IMDS_V4.octets()
}

/// The form of the instance metadata service's address in an IPv6 destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImdsV6 {
    /// `fd00:ec2::254`.
    Native,
    /// `::ffff:169.254.169.254`, for IPv4 by an `AF_INET6` socket.
    Mapped,
    /// A NAT64 (`64:ff9b::/96`, RFC 6052) or 6to4 (`2002::/16`, RFC 3056) form, which a gateway may translate back.
    Translated,
    /// Another address.
    No,
}

/// Classifies an IPv6 destination.
#[inline(always)]
#[must_use]
pub fn imds_v6(address: Ipv6Addr) -> ImdsV6 {
    match address.segments() {
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => ImdsV6::Native,
        [0, 0, 0, 0, 0, 0xffff, 0xa9fe, 0xa9fe] => ImdsV6::Mapped,
        [0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, 0xa9fe] | [0x2002, 0xa9fe, 0xa9fe, _, _, _, _, _] => {
            ImdsV6::Translated
        }
        _ => ImdsV6::No,
    }
}

/// Whether an IPv4 destination is judged. It is checked before a [`Caller`] is built, since nearly all connects end here.
/// `port` is in host order.
#[inline(always)]
#[must_use]
pub fn concerns_v4(address: Ipv4Addr, port: u16, target: &Target) -> bool {
    is_imds_v4(address) || target.is_v4(address, port)
}

/// Whether an IPv6 destination is judged.
#[inline(always)]
#[must_use]
pub fn concerns_v6(address: Ipv6Addr, port: u16, target: &Target) -> bool {
    imds_v6(address) != ImdsV6::No || target.is_v6(address, port)
}

/// The verdict for an IPv4 destination; `port` is in host order.
#[inline(always)]
#[must_use]
pub fn decide_v4(address: Ipv4Addr, port: u16, target: &Target, caller: Caller) -> Verdict {
    if !is_imds_v4(address) {
        return direct_verdict(target.is_v4(address, port), caller);
    }
    if let Some(verdict) = common_verdict(port, caller) {
        return verdict;
    }
    if target.v4_port == 0 {
        return Verdict::Deny(VerdictReason::NoTarget);
    }
    Verdict::Redirect(Destination::V4(Ipv4Addr::from_octets(target.v4), target.v4_port))
}

/// The verdict for an IPv6 destination; `port` is in host order. A v4-mapped one is redirected to the IPv4 listener.
#[inline(always)]
#[must_use]
pub fn decide_v6(address: Ipv6Addr, port: u16, target: &Target, caller: Caller) -> Verdict {
    let imds = imds_v6(address);
    if imds == ImdsV6::No {
        return direct_verdict(target.is_v6(address, port), caller);
    }
    if let Some(verdict) = common_verdict(port, caller) {
        return verdict;
    }
    let mapped = Destination::V6(Ipv4Addr::from_octets(target.v4).to_ipv6_mapped(), target.v4_port);
    match imds {
        ImdsV6::Native if target.v6_port != 0 => {
            Verdict::Redirect(Destination::V6(Ipv6Addr::from_octets(target.v6), target.v6_port))
        }
        ImdsV6::Native | ImdsV6::Mapped if target.v4_port != 0 => Verdict::Redirect(mapped),
        _ => Verdict::Deny(VerdictReason::NoTarget),
    }
}

/// The verdict for a destination other than the IMDS. The agent's own address is denied: such connections are not
/// redirected, so that no record identifies their callers.
#[inline(always)]
fn direct_verdict(to_agent: bool, caller: Caller) -> Verdict {
    if !to_agent || !caller.stream {
        Verdict::Pass(VerdictReason::Unrelated)
    } else if caller.exempt {
        Verdict::Pass(VerdictReason::Exempt)
    } else {
        Verdict::Deny(VerdictReason::Direct)
    }
}

/// The verdict that does not depend on the family, if there is one. Streams may be of any protocol: TCP or MPTCP.
#[inline(always)]
fn common_verdict(port: u16, caller: Caller) -> Option<Verdict> {
    if caller.exempt {
        Some(Verdict::Pass(VerdictReason::Exempt))
    } else if !caller.stream {
        Some(Verdict::Deny(VerdictReason::Datagram))
    } else if port != IMDS_PORT {
        Some(Verdict::Deny(VerdictReason::OtherPort))
    } else if !caller.leased {
        Some(Verdict::Deny(VerdictReason::NoLease))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: Caller = Caller { exempt: false, leased: true, stream: true };
    const NODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    const NODE_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
    const V4_ONLY: Target = Target { v4: NODE.octets(), v4_port: 3100, v6: [0; 16], v6_port: 0 };
    const BOTH: Target = Target { v6: NODE_V6.octets(), v6_port: 3101, ..V4_ONLY };
    const V6_ONLY: Target = Target { v4: [0; 4], v4_port: 0, ..BOTH };

    #[test]
    fn ipv4_decisions() {
        use Verdict::{Deny, Pass};
        use VerdictReason as Why;
        let redirect = Verdict::Redirect(Destination::V4(NODE, 3100));
        let other = Ipv4Addr::new(169, 254, 169, 253);
        let cases = [
            (IMDS_V4, 80, V4_ONLY, POD, redirect),
            (IMDS_V4, 8080, V4_ONLY, POD, Deny(Why::OtherPort)),
            (IMDS_V4, 80, V6_ONLY, POD, Deny(Why::NoTarget)),
            (IMDS_V4, 80, V4_ONLY, Caller { leased: false, ..POD }, Deny(Why::NoLease)),
            (IMDS_V4, 80, V4_ONLY, Caller { stream: false, ..POD }, Deny(Why::Datagram)),
            (IMDS_V4, 80, V4_ONLY, Caller { exempt: true, ..POD }, Pass(Why::Exempt)),
            (
                IMDS_V4,
                80,
                V4_ONLY,
                Caller { exempt: true, leased: false, stream: false },
                Pass(Why::Exempt),
            ),
            (other, 80, V4_ONLY, Caller { leased: false, ..POD }, Pass(Why::Unrelated)),
            (NODE, 3100, V4_ONLY, POD, Deny(Why::Direct)),
            (NODE, 3101, V4_ONLY, POD, Pass(Why::Unrelated)),
            (other, 3100, V4_ONLY, POD, Pass(Why::Unrelated)),
            (NODE, 3100, V4_ONLY, Caller { exempt: true, ..POD }, Pass(Why::Exempt)),
            (NODE, 3100, V4_ONLY, Caller { stream: false, ..POD }, Pass(Why::Unrelated)),
            (Ipv4Addr::UNSPECIFIED, 0, V6_ONLY, POD, Pass(Why::Unrelated)),
        ];
        for (address, port, target, caller, verdict) in cases {
            assert_eq!(
                decide_v4(address, port, &target, caller),
                verdict,
                "{address}:{port} {caller:?}"
            );
        }
    }

    #[test]
    fn other_traffic_is_not_judged() {
        let other = Ipv4Addr::new(169, 254, 169, 253);
        for (address, port, expected) in [
            (IMDS_V4, 80, true),
            (IMDS_V4, 8080, true),
            (NODE, 3100, true),
            (NODE, 80, false),
            (other, 80, false),
        ] {
            assert_eq!(concerns_v4(address, port, &V4_ONLY), expected, "{address}:{port}");
        }
    }

    #[test]
    fn the_agents_own_addresses_are_denied_in_every_form() {
        let denied = Verdict::Deny(VerdictReason::Direct);
        let unrelated = Verdict::Pass(VerdictReason::Unrelated);
        let cases = [
            (NODE.to_ipv6_mapped(), 3100, denied),
            (NODE_V6, 3101, denied),
            (NODE_V6, 3100, unrelated),
            (NODE.to_ipv6_mapped(), 3101, unrelated),
            (Ipv6Addr::LOCALHOST, 3101, unrelated),
        ];
        for (address, port, verdict) in cases {
            assert_eq!(decide_v6(address, port, &BOTH, POD), verdict, "[{address}]:{port}");
            assert_eq!(concerns_v6(address, port, &BOTH), verdict == denied, "[{address}]:{port}");
        }
    }

    #[test]
    fn pod_listeners_are_at_loopback_for_each_form() {
        let both = Target::pod_listeners(Sandbox { v4: 2000, v6: 2001, ..Sandbox::default() });
        let v4_only = Target::pod_listeners(Sandbox { v4: 2000, ..Sandbox::default() });
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let to = |address, port| Verdict::Redirect(Destination::V6(address, port));
        let v4 = Verdict::Redirect(Destination::V4(Ipv4Addr::LOCALHOST, 2000));
        assert_eq!(decide_v4(IMDS_V4, 80, &both, POD), v4);
        let cases = [
            (IMDS_V4.to_ipv6_mapped(), both, to(mapped, 2000)),
            (IMDS_V6, both, to(Ipv6Addr::LOCALHOST, 2001)),
            (IMDS_V6, v4_only, to(mapped, 2000)),
        ];
        for (address, target, expected) in cases {
            assert_eq!(decide_v6(address, 80, &target, POD), expected, "{address} {target:?}");
        }
    }

    #[test]
    fn port_zero_is_none_of_the_agents() {
        let ports = [3100, 0, 3101, 0];
        for (port, expected) in [(3100, true), (3101, true), (3102, false), (0, false)] {
            assert_eq!(is_agent_port(port, &ports), expected, "{port}");
        }
    }

    #[test]
    fn ipv6_decisions() {
        let mapped = IMDS_V4.to_ipv6_mapped();
        let to_v4 = Verdict::Redirect(Destination::V6(NODE.to_ipv6_mapped(), 3100));
        let to_v6 = Verdict::Redirect(Destination::V6(NODE_V6, 3101));
        let no_target = Verdict::Deny(VerdictReason::NoTarget);
        let nat64: Ipv6Addr = "64:ff9b::a9fe:a9fe".parse().unwrap();
        let six_to_four: Ipv6Addr = "2002:a9fe:a9fe:1::5".parse().unwrap();
        let cases = [
            (IMDS_V6, V4_ONLY, to_v4),
            (IMDS_V6, BOTH, to_v6),
            (IMDS_V6, V6_ONLY, to_v6),
            (IMDS_V6, Target::default(), no_target),
            (mapped, BOTH, to_v4),
            (mapped, V6_ONLY, no_target),
            (nat64, BOTH, no_target),
            (six_to_four, BOTH, no_target),
            (NODE_V6, BOTH, Verdict::Pass(VerdictReason::Unrelated)),
            (
                "::ffff:169.254.169.253".parse().unwrap(),
                BOTH,
                Verdict::Pass(VerdictReason::Unrelated),
            ),
        ];
        for (address, target, verdict) in cases {
            assert_eq!(decide_v6(address, 80, &target, POD), verdict, "{address} {target:?}");
        }
    }
}
