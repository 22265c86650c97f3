//! The mode of kube-proxy, which decides how Services' packets are routed.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use super::{Config, nftables, xtables};
use crate::guard::interface_names;
use kiam_core::preflight::{Check, Topic::KubeProxy};

/// Where kube-proxy answers which mode it is in (`--metrics-bind-address`).
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest answer that is read.
const LONGEST: u64 = 4096;
/// The interface with the Services' addresses in mode IPVS.
const IPVS: &str = "kube-ipvs0";
/// A chain in mode iptables, and the table in mode nftables.
const CHAIN: &str = "KUBE-SERVICES";
const TABLE: &str = "kube-proxy";

/// A mode of kube-proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProxyMode {
    Iptables,
    Ipvs,
    Nftables,
}

/// Judges by kube-proxy's answer, or by its traces.
pub(super) fn check(node: &Config) -> Check {
    let has_route = node.enforcing().is_none_or(|config| config.guard.route.is_some());
    judge(asked().or_else(traced), has_route)
}

/// What kube-proxy says.
fn asked() -> Option<ProxyMode> {
    let mut stream = TcpStream::connect_timeout(&METRICS, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET /proxyMode HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    // The server may keep the connection open.
    let _ = stream.take(LONGEST).read_to_string(&mut answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    if head.split(' ').nth(1) != Some("200") {
        return None;
    }
    match body.trim() {
        "iptables" => Some(ProxyMode::Iptables),
        "ipvs" => Some(ProxyMode::Ipvs),
        "nftables" => Some(ProxyMode::Nftables),
        _ => None,
    }
}

/// What its interface, its table and its chains show.
fn traced() -> Option<ProxyMode> {
    if interface_names().is_ok_and(|names| names.iter().any(|name| name == IPVS)) {
        return Some(ProxyMode::Ipvs);
    }
    let (mut table, mut chain) = (false, false);
    let named = nftables::each_name(|name| {
        table |= name == TABLE;
        chain |= name == CHAIN;
    });
    if named.is_ok() && table {
        return Some(ProxyMode::Nftables);
    }
    // The head of a chain has its name in place of a target's data.
    let heads = xtables::rules("nat").unwrap_or_default();
    chain |=
        heads.iter().any(|rule| rule.target == "ERROR" && rule.data.starts_with(CHAIN.as_bytes()));
    chain.then_some(ProxyMode::Iptables)
}

fn judge(mode: Option<ProxyMode>, has_route: bool) -> Check {
    match (mode, has_route) {
        (Some(ProxyMode::Iptables), _) => Check::ok(KubeProxy, "mode iptables"),
        (Some(ProxyMode::Nftables), _) => Check::ok(KubeProxy, "mode nftables"),
        (Some(ProxyMode::Ipvs), true) => {
            Check::ok(KubeProxy, "mode ipvs, whose packets the route guard stops, too")
        }
        (Some(ProxyMode::Ipvs), false) => Check::warn(
            KubeProxy,
            "mode ipvs, and no route guard: a Service whose endpoint is the metadata service leads pods there",
            "add route to --guard, or apply deploy/admission: docs/guard.md",
        ),
        (None, _) => Check::unknown(
            KubeProxy,
            "neither kube-proxy nor its rules are here",
            "where eBPF balances Services, such as Cilium's, use --guard=route,uplink: docs/guard.md",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Ok as Good, Unknown, Warn};

    use super::*;

    #[test]
    fn ipvs_needs_the_route_guard() {
        use ProxyMode::{Iptables, Ipvs, Nftables};
        for (mode, has_route, verdict) in [
            (Some(Iptables), false, Good),
            (Some(Nftables), false, Good),
            (Some(Ipvs), true, Good),
            (Some(Ipvs), false, Warn),
            (None, true, Unknown),
        ] {
            assert_eq!(judge(mode, has_route).verdict, verdict, "{mode:?}");
        }
    }
}
