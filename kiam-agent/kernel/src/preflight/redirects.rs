//! Rules that redirect pods' requests for the metadata service to somebody else, as kiam's and kube2iam's do; and the mode
//! of kube-proxy, which the same tables show.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
};

use kiam_common::redirect::{IMDS_V4, IMDS_V6};

use super::{Config, kube_proxy, listed, nftables, xtables};
use kiam_core::preflight::{Check, Topic::Redirects};

/// What sends packets elsewhere: expressions of nftables, and targets of iptables.
const REDIRECTING: [&str; 7] = ["nat", "redir", "tproxy", "DNAT", "REDIRECT", "TPROXY", "DNPT"];
/// The families of tables that pods' packets meet.
const FAMILIES: [&str; 3] = ["ip", "ip6", "inet"];
/// Tables of iptables that can redirect.
const TABLES: [&str; 2] = ["nat", "mangle"];

pub(super) fn checks(node: &Config) -> Vec<Check> {
    if node.intercept.is_none() {
        return Vec::new();
    }
    let found = found();
    let observes = node.enforcing().is_none();
    vec![judge(&found, observes), kube_proxy::check(node)]
}

/// The rules, with where they are and, if that is known, where they lead.
fn found() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let read = nftables::each_rule(|rule| {
        let to_imds = |value: &Vec<u8>| {
            value.as_slice() == IMDS_V4.octets() || value.as_slice() == IMDS_V6.octets()
        };
        let redirects = rule.does.iter().any(|name| REDIRECTING.contains(&name.as_str()));
        if redirects && FAMILIES.contains(&rule.family) && rule.compared.iter().any(to_imds) {
            let place = format!("nftables, {} {} {}", rule.family, rule.table, rule.chain);
            found.push(described(&place, &rule.target));
        }
    });
    match read {
        // The kernel has no nftables, so nobody has rules there.
        Err(error) if is_missing(&error) => {}
        read => read?,
    }
    for table in TABLES {
        for rule in xtables::rules(table)? {
            let (network, mask) = rule.destination;
            let bits = mask.to_bits();
            let leads = bits != 0 && IMDS_V4.to_bits() & bits == network.to_bits();
            if leads && REDIRECTING.contains(&rule.target.as_str()) {
                found.push(described(&format!("iptables-legacy, table {table}"), &rule.data));
            }
        }
    }
    Ok(found)
}

fn is_missing(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    matches!(number, Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOENT))
}

fn described(place: &str, target: &[u8]) -> String {
    match destination(target) {
        Some(to) => format!("to {to} ({place})"),
        None => place.to_owned(),
    }
}

/// The destination in the data of a target `DNAT`: `struct nf_nat_range2`, or `nf_nat_range` without its end.
fn destination(data: &[u8]) -> Option<SocketAddrV4> {
    let address = <[u8; 4]>::try_from(data.get(4..8)?).ok().map(Ipv4Addr::from)?;
    let port = u16::from_be_bytes(data.get(36..38)?.try_into().ok()?);
    (!address.is_unspecified()).then(|| SocketAddrV4::new(address, port))
}

fn judge(found: &io::Result<Vec<String>>, observes: bool) -> Check {
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            let finding = format!("the rules of nftables and iptables can't be read: {error}");
            return Check::unknown(Redirects, finding, "see capabilities and seccomp");
        }
    };
    let named = listed(found, 3);
    match (found.is_empty(), observes) {
        (true, _) => Check::ok(Redirects, "no rule redirects requests for the metadata service"),
        (false, true) => Check::ok(
            Redirects,
            format!("pods' requests are redirected, which --mode=observe leaves alone: {named}"),
        ),
        (false, false) => Check::warn(
            Redirects,
            format!("a rule redirects pods' requests, as kiam's and kube2iam's do: {named}"),
            "pods never get that far once the agent runs; remove the rule after the other agent: docs/migrating.md",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Ok as Good, Unknown, Warn};

    use super::*;

    #[test]
    fn a_redirect_is_a_warning_unless_the_agent_only_observes() {
        let one = || Ok(vec!["to 10.0.0.1:8181 (nftables, ip nat PREROUTING)".to_owned()]);
        for (found, observes, verdict) in [
            (Ok(Vec::new()), false, Good),
            (one(), false, Warn),
            (one(), true, Good),
            (Err(io::Error::from_raw_os_error(libc::EPERM)), false, Unknown),
        ] {
            let check = judge(&found, observes);
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
    }

    #[test]
    fn the_destination_is_read_if_it_is_whole() {
        let mut data = vec![0; 44];
        data[4..8].copy_from_slice(&[10, 0, 0, 1]);
        data[36..38].copy_from_slice(&8181_u16.to_be_bytes());
        assert_eq!(destination(&data), Some("10.0.0.1:8181".parse().unwrap()));
        for other in [&data[..30], &[], &[0; 44]] {
            assert_eq!(destination(other), None);
        }
    }
}
