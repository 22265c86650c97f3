//! The node's packet filter: as many rules as kube-proxy makes for services, and the DNAT that a way needs.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use anyhow::Result;
use lab::{AGENT_PORT, IMDS_V4, NODE_V4, Node};

use super::way::{Place, Way};
use xtask::command::{command, output_of, printed_for};

/// Kubernetes' usual range of service addresses, 10.96.0.0/12, holds far more than are asked for.
const SERVICES: u32 = Ipv4Addr::new(10, 96, 0, 0).to_bits();
/// Where a service leads; nothing is there, as nobody asks for one.
const ENDPOINT: &str = "10.77.254.1:443";

/// What of the two programs is there; their versions, as they say them.
#[derive(Clone, Debug, Default)]
pub(super) struct Tools {
    pub(super) iptables: Option<String>,
    pub(super) nftables: Option<String>,
}

// === impl Tools ===

impl Tools {
    /// Looks for them.
    pub(super) fn look() -> Self {
        let version = |program: &str| output_of(command(program).arg("--version"));
        Self { iptables: version("iptables"), nftables: version("nft") }
    }

    /// Why `way` can't be measured with `rules` of kube-proxy; `None`: it can.
    pub(super) fn lack(&self, way: Way, rules: u32) -> Option<&'static str> {
        let iptables = rules > 0 || matches!(way, Way::Iptables(_));
        if iptables && self.iptables.is_none() {
            return Some("iptables is not installed");
        }
        let nftables = matches!(way, Way::Nftables(_));
        (nftables && self.nftables.is_none()).then_some("nftables is not installed")
    }
}

/// Loads what `way` and `rules` services need into the node's own namespace.
pub(super) fn load(node: &Node, way: Way, rules: u32) -> Result<()> {
    if let Some(text) = iptables(way, rules) {
        printed_for(&mut node.netns().command("iptables-restore"), &text)?;
    }
    if let Some(text) = nftables(way) {
        let mut nft = node.netns().command("nft");
        printed_for(nft.args(["-f", "-"]), &text)?;
    }
    Ok(())
}

/// The input of `iptables-restore`; `None` where it has nothing to do, so that nothing of it is in the kernel.
fn iptables(way: Way, rules: u32) -> Option<String> {
    let place = match way {
        Way::Iptables(place) => Some(place),
        _ => None,
    };
    if rules == 0 && place.is_none() {
        return None;
    }
    // As kiam's agent writes it.
    let dnat = format!(
        "-A PREROUTING -d {IMDS_V4}/32 -i pod+ -p tcp -m tcp --dport 80 -j DNAT --to-destination {NODE_V4}:{AGENT_PORT}\n"
    );
    let mut text = "*nat\n".to_owned();
    let mut further = String::new();
    if place == Some(Place::First) {
        further.push_str(&dnat);
    }
    if rules > 0 {
        text.push_str(":KUBE-SERVICES - [0:0]\n:KUBE-SVC-LAB - [0:0]\n");
        further.push_str(
            "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n",
        );
    }
    if place == Some(Place::Last) {
        further.push_str(&dnat);
    }
    for number in 0..rules {
        let service = Ipv4Addr::from_bits(SERVICES + number);
        writeln!(
            further,
            "-A KUBE-SERVICES -d {service}/32 -p tcp -m comment --comment \"lab/service-{number} cluster IP\" \
             -m tcp --dport 443 -j KUBE-SVC-LAB"
        )
        .expect("a String takes what is written");
    }
    if rules > 0 {
        let endpoint = format!("-A KUBE-SVC-LAB -p tcp -j DNAT --to-destination {ENDPOINT}\n");
        further.push_str(&endpoint);
    }
    Some(text + &further + "COMMIT\n")
}

/// The input of `nft`: a chain beside kube-proxy's, whose priority says which is first.
fn nftables(way: Way) -> Option<String> {
    let Way::Nftables(place) = way else { return None };
    let priority = match place {
        Place::First => "dstnat - 10",
        Place::Last => "dstnat + 10",
    };
    Some(format!(
        "table ip kiam {{\n\
         chain prerouting {{\n\
         type nat hook prerouting priority {priority};\n\
         iifname \"pod*\" ip daddr {IMDS_V4} tcp dport 80 dnat to {NODE_V4}:{AGENT_PORT}\n\
         }}\n}}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dnat_is_on_its_side_of_the_services() {
        for (place, first) in [(Place::First, "-d 169"), (Place::Last, "-m comment")] {
            let text = iptables(Way::Iptables(place), 3).unwrap();
            let hooks: Vec<_> =
                text.lines().filter_map(|line| line.strip_prefix("-A PREROUTING ")).collect();
            assert_eq!(hooks.len(), 2, "{text}");
            assert!(hooks[0].starts_with(first), "{text}");
        }
        let before = nftables(Way::Nftables(Place::First)).unwrap();
        assert!(before.contains("priority dstnat - 10;"), "{before}");
    }

    #[test]
    fn every_service_has_an_address_of_its_own() {
        let text = iptables(Way::Direct, 50_000).unwrap();
        let services: std::collections::BTreeSet<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("-A KUBE-SERVICES -d ")?.split(' ').next())
            .collect();
        assert_eq!(services.len(), 50_000);
        assert!(!text.contains("-d 169.254.169.254"), "a direct connection needs no DNAT");
    }

    #[test]
    fn nothing_is_loaded_where_nothing_is_needed() {
        for way in Way::ALL {
            let loads = iptables(way, 0).is_some() || nftables(way).is_some();
            assert_eq!(loads, matches!(way, Way::Iptables(_) | Way::Nftables(_)), "{way:?}");
        }
    }

    #[test]
    fn what_lacks_its_program_is_left_out() {
        let none = Tools::default();
        assert_eq!(none.lack(Way::Node, 0), None);
        assert_eq!(none.lack(Way::Node, 1), Some("iptables is not installed"));
        let iptables = Tools { iptables: Some("v1".to_owned()), nftables: None };
        assert_eq!(iptables.lack(Way::Iptables(Place::Last), 1), None);
        assert_eq!(iptables.lack(Way::Nftables(Place::Last), 0), Some("nftables is not installed"));
    }
}
