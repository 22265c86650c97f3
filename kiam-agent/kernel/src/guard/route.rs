//! The route guard: policy routing rules on the node that prohibit forwarding packets to the IMDS.
//!
//! For each family, at preference P, before the rules of the CNI:
//!
//! ```text
//! P:    to <IMDS> iif lo ipproto tcp       goto P+4    the node's sockets
//! P:    to <IMDS> iif lo ipproto udp       goto P+4    (programs look up their source address by a UDP connect)
//! P+1:  to <IMDS> iif lo from 0.0.0.0/32   prohibit    IPv4 only: what the kernel forwards as if it were the node's own
//! P+2:  to <IMDS> iif lo                   goto P+4    IPv4: the node's own look-ups that have a source address
//! P+2:  to <IMDS> iif lo from ::/1         goto P+4    IPv6: the same, in two halves
//! P+2:  to <IMDS> iif lo from 8000::/1     goto P+4
//! P+3:  to <IMDS>                          prohibit    what is forwarded: ICMP "administratively prohibited"
//! P+4:  to <IMDS>                          nop
//! ```
//!
//! `iif lo` alone does not prove that the node sends a packet. IPVS routes the packets of a Service as if they were the
//! node's own, so that an EndpointSlice with the IMDS's address would lead pods there. Such a look-up has a destination
//! and nothing else (`do_output_route4` and `__ip_vs_route_output_v6` in `ip_vs_xmit.c`; the TEE target
//! and bridged DNAT do the same). A socket's look-up has a protocol. The node's other look-ups have no protocol, but they
//! have a source address: the reverse path filter's for the IMDS's answers, and those that repeat a look-up after a
//! netfilter rule changed a packet's mark. There are rules for these look-ups, rather than one by protocol, because such
//! a rule would make the kernel dissect each packet that the node forwards.
//!
//! The rules use `goto` and not a look-up of the main table, so that the node's own look-ups do not change, even where its
//! route to the IMDS is in another table or in a VRF. The rules are marked by [`PROTOCOL`] and outlive the agent.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use kiam_common::redirect::{IMDS_V4, IMDS_V6};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, IpProtocol, RouteNetlinkMessage,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use tracing::{info, warn};

use crate::sys::{netlink::Netlink, rejection::kernel_release};

/// The protocols with which the node's sockets may look up the IMDS.
const SOCKETS: [IpProtocol; 2] = [IpProtocol::Tcp, IpProtocol::Udp];
/// All addresses of IPv6, as prefixes of one bit: a prefix of none would match look-ups without a source address too.
const HALVES: [Ipv6Addr; 2] = [Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0x8000, 0, 0, 0, 0, 0, 0, 0)];

/// Marks the agent's rules (`FRA_PROTOCOL`, kernel 4.17). Neither iproute2 nor a routing daemon uses this number.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(107);

/// A file that exists where the kernel has IPv6.
const IPV6_ADDRESSES: &str = "/proc/net/if_inet6";

/// The addresses of the IMDS, one per family.
pub(crate) fn imds_addresses() -> [IpAddr; 2] {
    [IpAddr::from(IMDS_V4), IpAddr::from(IMDS_V6)]
}

/// Rounds of removal. Removing a rule with few attributes may remove one with more instead, so that removal takes several
/// rounds while an agent with rules of another shape runs.
const ROUNDS: usize = 5;

/// The look-ups of a destination that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lookups {
    /// All of them.
    All,
    /// Look-ups of the node itself: to the kernel, packets that the node sends come in by lo.
    Local,
    /// As [`Lookups::Local`], for a socket of this protocol.
    LocalOf(IpProtocol),
    /// As [`Lookups::Local`], with a source address of this prefix. A look-up without a source address has 0.0.0.0 in
    /// IPv4, and matches no prefix in IPv6.
    LocalFrom(IpAddr, u8),
}

/// The action of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Skip to this preference, past the prohibitions.
    PassTo(u32),
    /// Reject the packet.
    Prohibit,
    /// Do nothing: the target of [`Act::PassTo`].
    Land,
}

/// A rule of the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    to: IpAddr,
    preference: u32,
    lookups: Lookups,
    act: Act,
}

/// Adds the missing rules of `address`'s family at `preference`, and returns their number.
///
/// # Errors
///
/// The kernel's; `EAFNOSUPPORT` where it has no rules for the family.
pub(super) fn add(address: IpAddr, preference: u32) -> io::Result<usize> {
    let netlink = Netlink::route()?;
    let present = dump(&netlink, address)?;
    let mut added = 0;
    for rule in wanted(address, preference) {
        if present.iter().any(|message| rule.is(message)) {
            continue;
        }
        let order = RouteNetlinkMessage::NewRule(rule.message());
        match netlink.order(order, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => added += 1,
            // Another agent was faster, or another program has the same rule.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(added)
}

/// How many of the rules of `address`'s family at `preference` are not there.
///
/// # Errors
///
/// The kernel's, as for [`add`].
pub(super) fn missing(address: IpAddr, preference: u32) -> io::Result<usize> {
    let present = dump(&Netlink::route()?, address)?;
    let is_there = |rule: &Rule| present.iter().any(|message| rule.is(message));
    Ok(wanted(address, preference).iter().filter(|rule| !is_there(rule)).count())
}

/// Removes the agent's rules of `address`'s family, except those at `preference`, and returns the removed ones.
///
/// # Errors
///
/// The kernel's, as for [`add`].
pub(super) fn remove_but(address: IpAddr, preference: Option<u32>) -> io::Result<Vec<String>> {
    let netlink = Netlink::route()?;
    let kept = preference.map(|preference| wanted(address, preference)).unwrap_or_default();
    let mut removed = Vec::new();
    for _ in 0..ROUNDS {
        let mut others = dump(&netlink, address)?;
        others.retain(|message| !kept.iter().any(|rule| rule.is(message)));
        if others.is_empty() {
            break;
        }
        // The prohibitions first: without the other rules they would apply to the node as well. Among equals, rules with
        // more attributes first, as their removal matches no other rule.
        others.sort_by_key(|message| {
            let passes = message.header.action != RuleAction::Prohibit;
            (passes, std::cmp::Reverse(message.attributes.len()))
        });
        for message in others {
            let name = describe(&message);
            match netlink.order(RouteNetlinkMessage::DelRule(message), 0) {
                Ok(()) => removed.push(name),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        // A rule to keep may have been removed in place of one with fewer attributes, so it is added again.
        preference.map_or(Ok(0), |preference| add(address, preference))?;
    }
    Ok(removed)
}

/// The rules of `address`'s family as arguments of `ip rule add`, in the order in which they are added.
pub(super) fn commands(address: IpAddr, preference: u32) -> Vec<String> {
    wanted(address, preference).into_iter().map(Rule::command).collect()
}

/// Logs what the guard does about IPv6, for which the kernel may have no rules.
pub(super) fn report_ipv6(has_rules: bool) {
    if has_rules {
        return;
    }
    match Path::new(IPV6_ADDRESSES).exists() {
        true => warn!(
            kernel = kernel_release(),
            "The kernel has no routing rules for IPv6 (CONFIG_IPV6_MULTIPLE_TABLES): the route guard covers IPv4 alone"
        ),
        false => info!("The node has no IPv6: the route guard covers IPv4 alone"),
    }
}

/// The agent's own rules. A foreign rule with the same effect does not count: it may be removed at any time.
fn dump(netlink: &Netlink, address: IpAddr) -> io::Result<Vec<RuleMessage>> {
    let mut question = RuleMessage::default();
    question.header.family = family(address);
    let answers = netlink.dump(RouteNetlinkMessage::GetRule(question))?;
    let ours = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewRule(message) if is_ours(&message, address) => Some(message),
        _ => None,
    });
    Ok(ours.collect())
}

/// The rules of one family, in the order in which they are added, so that no prohibition ever applies to the node itself.
fn wanted(to: IpAddr, preference: u32) -> Vec<Rule> {
    let rule = |further, lookups, act| Rule { to, preference: preference + further, lookups, act };
    let pass = Act::PassTo(preference + 4);
    let mut rules = vec![rule(4, Lookups::All, Act::Land)];
    rules.extend(SOCKETS.map(|protocol| rule(0, Lookups::LocalOf(protocol), pass)));
    match to {
        IpAddr::V4(_) => rules.push(rule(2, Lookups::Local, pass)),
        IpAddr::V6(_) => {
            rules.extend(HALVES.map(|half| rule(2, Lookups::LocalFrom(half.into(), 1), pass)));
        }
    }
    rules.push(rule(3, Lookups::All, Act::Prohibit));
    if to.is_ipv4() {
        let nothing = Lookups::LocalFrom(Ipv4Addr::UNSPECIFIED.into(), 32);
        rules.push(rule(1, nothing, Act::Prohibit));
    }
    rules
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn is_ours(message: &RuleMessage, address: IpAddr) -> bool {
    message.attributes.contains(&RuleAttribute::Protocol(PROTOCOL))
        && message.attributes.contains(&RuleAttribute::Destination(address))
}

fn describe(message: &RuleMessage) -> String {
    let mut preference = 0;
    let mut to = String::new();
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => preference = *value,
            RuleAttribute::Destination(address) => to = address.to_string(),
            _ => {}
        }
    }
    format!("routing rule {preference}: to {to} {:?}", message.header.action).to_lowercase()
}

/// Whether the kernel adds this attribute to every rule.
fn is_default(attribute: &RuleAttribute) -> bool {
    matches!(
        attribute,
        RuleAttribute::Table(_)
            | RuleAttribute::SuppressPrefixLen(_)
            | RuleAttribute::SuppressIfGroup(_)
            | RuleAttribute::Other(_)
    )
}

// === impl Lookups ===

impl Lookups {
    fn attributes(self) -> Vec<RuleAttribute> {
        let local = RuleAttribute::Iifname("lo".to_owned());
        match self {
            Self::All => Vec::new(),
            Self::Local => vec![local],
            Self::LocalOf(protocol) => vec![local, RuleAttribute::IpProtocol(protocol)],
            Self::LocalFrom(source, _) => vec![local, RuleAttribute::Source(source)],
        }
    }

    fn source_prefix(self) -> u8 {
        match self {
            Self::LocalFrom(_, prefix) => prefix,
            Self::All | Self::Local | Self::LocalOf(_) => 0,
        }
    }
}

// === impl Rule ===

impl Rule {
    fn message(self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = family(self.to);
        message.header.dst_len = host_prefix(self.to);
        message.header.src_len = self.lookups.source_prefix();
        message.attributes = vec![
            RuleAttribute::Priority(self.preference),
            RuleAttribute::Destination(self.to),
            RuleAttribute::Protocol(PROTOCOL),
        ];
        message.attributes.extend(self.lookups.attributes());
        message.header.action = match self.act {
            Act::PassTo(target) => {
                message.attributes.push(RuleAttribute::Goto(target));
                RuleAction::Goto
            }
            Act::Prohibit => RuleAction::Prohibit,
            Act::Land => RuleAction::Nop,
        };
        message
    }

    /// The arguments of `ip rule add`.
    fn command(self) -> String {
        let lookups = match self.lookups {
            Lookups::All => String::new(),
            Lookups::Local => " iif lo".to_owned(),
            Lookups::LocalOf(protocol) => format!(" iif lo ipproto {}", i32::from(protocol)),
            Lookups::LocalFrom(source, prefix) => format!(" from {source}/{prefix} iif lo"),
        };
        let act = match self.act {
            Act::PassTo(target) => format!("goto {target}"),
            Act::Prohibit => "prohibit".to_owned(),
            Act::Land => "nop".to_owned(),
        };
        let Self { to, preference, .. } = self;
        format!("pref {preference} to {to}{lookups} {act} protocol {}", u8::from(PROTOCOL))
    }

    /// Whether the kernel's `message` is exactly this rule, with no attribute less or more.
    fn is(self, message: &RuleMessage) -> bool {
        let own = self.message();
        let attributes: Vec<_> = message.attributes.iter().filter(|it| !is_default(it)).collect();
        message.header.action == own.header.action
            && message.header.src_len == own.header.src_len
            && message.header.dst_len == own.header.dst_len
            && attributes.len() == own.attributes.len()
            && attributes.iter().all(|it| own.attributes.contains(it))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel tells of a rule: in another order, and with more in it.
    fn told(rule: Rule) -> RuleMessage {
        let mut message = rule.message();
        message.attributes.reverse();
        message.attributes.push(RuleAttribute::Table(0));
        message.attributes.push(RuleAttribute::SuppressPrefixLen(u32::MAX));
        message
    }

    /// The rules of agents before this one: `iif lo` alone passed.
    fn earlier(to: IpAddr, preference: u32) -> [Rule; 3] {
        let rule =
            |further, lookups, act| Rule { to, preference: preference + further, lookups, act };
        [
            rule(2, Lookups::All, Act::Land),
            rule(0, Lookups::Local, Act::PassTo(preference + 2)),
            rule(1, Lookups::All, Act::Prohibit),
        ]
    }

    #[test]
    fn each_rule_is_read_as_itself_and_as_no_other() {
        for address in imds_addresses() {
            let rules = wanted(address, 5);
            for rule in &rules {
                let message = told(*rule);
                assert!(is_ours(&message, address));
                let same: Vec<_> = rules.iter().filter(|other| other.is(&message)).collect();
                assert_eq!(same, [rule]);
            }
        }
    }

    #[test]
    fn rules_of_earlier_agents_are_ours_and_none_of_those_that_are_kept() {
        for address in imds_addresses() {
            for message in earlier(address, 5).map(told) {
                assert!(is_ours(&message, address));
                assert!(!wanted(address, 5).iter().any(|rule| rule.is(&message)), "{message:?}");
            }
        }
    }

    #[test]
    fn rules_of_others_are_not_ours_and_other_targets_are_not_the_same() {
        let [to, _] = imds_addresses();
        let pass = wanted(to, 5)[1];
        let mut message = told(pass);
        message.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
        assert!(!is_ours(&message, to), "without the mark");
        let elsewhere = told(Rule { act: Act::PassTo(8), ..pass });
        assert!(!pass.is(&elsewhere), "goes elsewhere");
        let mut narrower = told(pass);
        narrower.attributes.push(RuleAttribute::FwMark(7));
        assert!(!pass.is(&narrower), "matches less");
        let other = told(Rule { to: [10, 0, 0, 1].into(), ..pass });
        assert!(!is_ours(&other, to), "to elsewhere");
    }

    #[test]
    fn what_passes_is_told_by_protocol_or_source_and_the_prohibitions_come_last() {
        for to in imds_addresses() {
            let rules = wanted(to, 5);
            let first = rules.iter().position(|rule| rule.act == Act::Prohibit).unwrap();
            assert!(rules[first..].iter().all(|rule| rule.act == Act::Prohibit), "{rules:?}");
            let passing = rules.iter().filter(|rule| matches!(rule.act, Act::PassTo(9)));
            for rule in passing {
                // In IPv4, that with neither was prohibited one preference before.
                let bare = rule.lookups == Lookups::Local && to.is_ipv4() && rule.preference == 7;
                let told = matches!(rule.lookups, Lookups::LocalOf(_) | Lookups::LocalFrom(_, 1));
                assert!(bare || told, "{rule:?}");
            }
        }
    }
}
