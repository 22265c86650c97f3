//! Routing rules of others that come before the guard's, so that packets to the IMDS may not reach the guard's.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::route::PROTOCOL;
use crate::sys::netlink::Netlink;

/// The table of local addresses, whose rule comes first everywhere: `RT_TABLE_LOCAL`.
const LOCAL: u32 = 255;

/// The rules for `address` that come before the last of a guard of this `preference`, as `ip rule` shows them.
///
/// # Errors
///
/// The kernel's; `EAFNOSUPPORT` where it has no rules for the family.
pub(crate) fn rules_before(address: IpAddr, preference: u32) -> io::Result<Vec<String>> {
    let mut question = RuleMessage::default();
    question.header.family =
        if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let answers = Netlink::route()?.dump(RouteNetlinkMessage::GetRule(question))?;
    let rules = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewRule(message) => Some(message),
        _ => None,
    });
    Ok(rules
        .filter(|rule| precedes(rule, address, preference))
        .map(|rule| describe(&rule))
        .collect())
}

/// Whether the rule may route a forwarded packet to `address` before the guard of `preference` prohibits that.
fn precedes(rule: &RuleMessage, address: IpAddr, preference: u32) -> bool {
    let routes = matches!(rule.header.action, RuleAction::ToTable | RuleAction::Goto);
    if !routes || priority(rule) > preference + 3 || table(rule) == LOCAL {
        return false;
    }
    rule.attributes.iter().all(|attribute| match attribute {
        RuleAttribute::Protocol(protocol) => *protocol != PROTOCOL,
        RuleAttribute::Destination(to) => covers(*to, rule.header.dst_len, address),
        // The node's own packets.
        RuleAttribute::Iifname(name) => name != "lo",
        _ => true,
    })
}

fn priority(rule: &RuleMessage) -> u32 {
    let found = rule.attributes.iter().rev().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    found.unwrap_or_default()
}

fn table(rule: &RuleMessage) -> u32 {
    let found = rule.attributes.iter().rev().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    found.unwrap_or(rule.header.table.into())
}

/// Whether `network` with this `prefix` has `address`.
fn covers(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let differing = bits(network) ^ bits(address);
    differing.leading_zeros() >= u32::from(prefix)
}

fn describe(rule: &RuleMessage) -> String {
    let mut text = format!("{}:", priority(rule));
    for attribute in &rule.attributes {
        text += &match attribute {
            RuleAttribute::Destination(to) => format!(" to {to}/{}", rule.header.dst_len),
            RuleAttribute::Source(from) => format!(" from {from}/{}", rule.header.src_len),
            RuleAttribute::Iifname(name) => format!(" iif {name}"),
            RuleAttribute::FwMark(mark) => format!(" fwmark {mark:#x}"),
            RuleAttribute::Goto(to) => format!(" goto {to}"),
            _ => continue,
        };
    }
    if rule.header.action == RuleAction::ToTable {
        text += &format!(" lookup {}", table(rule));
    }
    text
}

#[cfg(test)]
mod tests {
    use kiam_common::redirect::IMDS_V4;

    use super::*;

    fn rule(preference: u32, attributes: &[RuleAttribute]) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = attributes.to_vec();
        rule.attributes.push(RuleAttribute::Priority(preference));
        rule.attributes.push(RuleAttribute::Table(2004));
        rule
    }

    #[test]
    fn rules_that_may_route_to_the_imds_first_are_found() {
        use RuleAttribute::{Destination, FwMark, Iifname, Protocol, Table};
        let to = |text: &str, prefix| {
            let mut rule = rule(3, &[Destination(text.parse().unwrap())]);
            rule.header.dst_len = prefix;
            rule
        };
        let mut local = rule(0, &[]);
        local.attributes.push(Table(LOCAL));
        let mut prohibits = rule(3, &[]);
        prohibits.header.action = RuleAction::Prohibit;
        let cases = [
            (rule(3, &[]), true),
            (rule(8, &[]), true),
            (rule(9, &[]), false),
            (rule(512, &[]), false),
            (rule(3, &[FwMark(0x200)]), true),
            (rule(3, &[Iifname("lo".to_owned())]), false),
            (rule(3, &[Iifname("eni1".to_owned())]), true),
            (rule(3, &[Protocol(PROTOCOL)]), false),
            (to("10.0.0.0", 8), false),
            (to("169.254.0.0", 16), true),
            (to("169.254.169.253", 32), false),
            (local, false),
            (prohibits, false),
        ];
        for (rule, expected) in cases {
            assert_eq!(precedes(&rule, IMDS_V4.into(), 5), expected, "{rule:?}");
        }
        let shown = describe(&rule(9, &[FwMark(0x200), Iifname("eni1".to_owned())]));
        assert_eq!(shown, "9: fwmark 0x200 iif eni1 lookup 2004");
    }
}
