//! The destinations that are reached without a proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// EC2's own services: IMDS, and the agents that serve credentials to containers.
/// <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>
const EC2: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0), 32);
const LINK_LOCAL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);

/// The entries of `NO_PROXY`.
#[derive(Clone, Debug, Default)]
pub(super) struct NoProxy {
    everything: bool,
    exemptions: Vec<Exemption>,
}

#[derive(Clone, Debug)]
enum Exemption {
    Network(IpNet),
    Address(IpAddr, Option<u16>),
    /// The names that end in `suffix`, which begins with a dot; with `itself` also the name without the dot.
    Domain {
        suffix: String,
        itself: bool,
        port: Option<u16>,
    },
}

// === impl NoProxy ===

impl NoProxy {
    /// Parses a list with commas. Invalid entries are ignored, as in Go.
    pub(super) fn parse(list: &str) -> Self {
        let entries = list.split(',').map(|entry| entry.trim().to_ascii_lowercase());
        let entries: Vec<String> = entries.filter(|entry| !entry.is_empty()).collect();
        let everything = entries.iter().any(|entry| entry == "*");
        let exemptions = entries.iter().filter_map(|entry| Exemption::parse(entry)).collect();
        Self { everything, exemptions }
    }

    /// Whether `host`, in the form of URIs, is reached at `port` without a proxy.
    pub(super) fn has(&self, host: &str, port: u16) -> bool {
        let host = host.to_ascii_lowercase();
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let address = bare.unwrap_or(&host).parse().ok().map(|it: IpAddr| it.to_canonical());
        let always = address.map_or(host == "localhost", is_own);
        always || self.everything || self.exemptions.iter().any(|it| it.has(&host, address, port))
    }
}

/// Whether the address is local to this node, which no variable changes.
fn is_own(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || LINK_LOCAL.contains(&v4),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || EC2.contains(&v6),
    }
}

// === impl Exemption ===

impl Exemption {
    fn parse(entry: &str) -> Option<Self> {
        if let Ok(network) = entry.parse() {
            return Some(Self::Network(network));
        }
        let (host, port) = match split_port(entry) {
            // Another text matches no port.
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(Self::Address(address.to_canonical(), port));
        }
        let host = if host.starts_with("*.") { &host[1..] } else { host };
        if host.is_empty() {
            return None;
        }
        let itself = !host.starts_with('.');
        let suffix = if itself { format!(".{host}") } else { host.to_owned() };
        Some(Self::Domain { suffix, itself, port })
    }

    fn has(&self, host: &str, address: Option<IpAddr>, port: u16) -> bool {
        let at = |own: &Option<u16>| own.is_none_or(|own| own == port);
        match self {
            Self::Network(network) => address.is_some_and(|address| network.contains(&address)),
            Self::Address(own, port) => address == Some(*own) && at(port),
            Self::Domain { suffix, itself, port } => {
                (host.ends_with(suffix) || *itself && host == &suffix[1..]) && at(port)
            }
        }
    }
}

/// Splits `host:port` or `[v6]:port`.
fn split_port(entry: &str) -> Option<(&str, &str)> {
    let (host, port) = entry.rsplit_once(':')?;
    if let Some(v6) = host.strip_prefix('[') {
        return Some((v6.strip_suffix(']')?, port));
    }
    (!host.contains(':')).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in Go's own tests (`golang.org/x/net/http/httpproxy`, `TestUseProxy`), and what they leave out.
    #[test]
    fn hosts_are_left_out_as_go_does() {
        let list = "foo.com, .barbaz.net, *.wild.io, 192.168.1.1, 192.168.1.2:81, 192.168.1.3:80, \
                    10.0.0.0/30, 2001:db8::52:0:1, [2001:db8::52:0:2]:443, [2001:db8::52:0:3]:80, \
                    2002:db8:a::45/64, Upper.Case, ported.net:8443, , :, bad:port,";
        let no_proxy = NoProxy::parse(list);
        let cases = [
            ("localhost", true),
            ("127.0.0.1", true),
            ("127.0.0.2", true),
            ("[::1]", true),
            ("[::2]", false),
            ("192.168.1.1", true),
            ("192.168.1.2", false),
            ("192.168.1.3", true),
            ("192.168.1.4", false),
            ("10.0.0.2", true),
            ("10.0.0.4", false),
            ("[2001:db8::52:0:1]", true),
            ("[2001:db8::52:0:2]", false),
            ("[2001:db8::52:0:3]", true),
            ("[2002:db8:a::123]", true),
            ("[fe80::424b:c8be:1643:a1b6]", true),
            ("barbaz.net", false),
            ("www.barbaz.net", true),
            ("foobarbaz.net", false),
            ("foo.com", true),
            ("FOO.com", true),
            ("www.foo.com", true),
            ("foofoo.com", false),
            ("wild.io", false),
            ("a.b.wild.io", true),
            ("upper.case", true),
            ("ported.net", false),
            ("bad", false),
            ("[::ffff:192.168.1.1]", true),
        ];
        for (host, expected) in cases {
            assert_eq!(no_proxy.has(host, 80), expected, "{host}");
        }
        assert!(no_proxy.has("www.ported.net", 8443));
        assert!(NoProxy::parse("a,*").has("anything.example", 443));
        assert!(!NoProxy::default().has("anything.example", 443));
    }

    #[test]
    fn what_is_the_nodes_own_is_never_asked_through_a_proxy() {
        let own = [
            "169.254.169.254",
            "169.254.170.2",
            "169.254.170.23",
            "[::ffff:169.254.169.254]",
            "[fe80::1]",
            "[febf::1]",
            "[fd00:ec2::254]",
            "[fd00:ec2::23]",
        ];
        for host in own {
            assert!(NoProxy::default().has(host, 80), "{host}");
        }
        for host in ["169.253.0.1", "[fd00:ec3::254]", "[fec0::1]", "localhost.example"] {
            assert!(!NoProxy::default().has(host, 80), "{host}");
        }
    }
}
