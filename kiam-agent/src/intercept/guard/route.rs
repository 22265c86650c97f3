//! The route guard: policy routing rules on the node, so that what is forwarded to the IMDS is prohibited.
//!
//! For each family, at preference P, before the rules of the CNI:
//!
//! ```text
//! P:    to <IMDS> iif lo  goto P+2     what the node itself sends: as if there were no rule of ours
//! P+1:  to <IMDS>         prohibit     what is forwarded: ICMP "administratively prohibited"
//! P+2:  to <IMDS>         nop
//! ```
//!
//! `goto` and not a look-up of the main table: where the node's own route to the IMDS is in another table, or in a
//! VRF, its look-ups stay exactly as they were. The rules are found again by [`PROTOCOL`] and outlive the agent.

use std::{io, net::IpAddr};

use kiam_common::redirect::{IMDS_V4, IMDS_V6};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::netlink::Netlink;

/// Marks the rules as ours (`FRA_PROTOCOL`, kernel 4.17). No number that iproute2 or a routing daemon uses.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(107);

/// Both addresses of the IMDS: one a family.
pub(super) fn imds_addresses() -> [IpAddr; 2] {
    [IpAddr::from(IMDS_V4), IpAddr::from(IMDS_V6)]
}

/// What one rule does with a packet that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Skips the prohibition, if the node itself sends the packet.
    PassOwn,
    /// Refuses the packet.
    Prohibit,
    /// Nothing: where [`Act::PassOwn`] goes on.
    Land,
}

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    to: IpAddr,
    preference: u32,
    act: Act,
}

/// Makes the rules of `address`'s family be there, at `preference`; how many were missing.
///
/// # Errors
///
/// The kernel's; `EAFNOSUPPORT` where it has no rules for the family.
pub(super) fn add(address: IpAddr, preference: u32) -> io::Result<usize> {
    let netlink = Netlink::route()?;
    let present = dump(&netlink, address)?;
    let mut added = 0;
    for rule in wanted(address, preference) {
        if present.iter().any(|is| is.rule == Some(rule)) {
            continue;
        }
        let order = RouteNetlinkMessage::NewRule(rule.message());
        match netlink.order(order, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => added += 1,
            // Another agent was faster, or somebody else has the very same rule.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(added)
}

/// Removes the rules of ours of `address`'s family but for those at `preference`, and says which.
///
/// # Errors
///
/// The kernel's, as for [`add`].
pub(super) fn remove_but(address: IpAddr, preference: Option<u32>) -> io::Result<Vec<String>> {
    let netlink = Netlink::route()?;
    let kept = preference.map(|preference| wanted(address, preference));
    let is_kept =
        |rule: Option<Rule>| kept.zip(rule).is_some_and(|(kept, rule)| kept.contains(&rule));
    let mut others = dump(&netlink, address)?;
    others.retain(|is| !is_kept(is.rule));
    // The prohibition first: without its neighbours it would be the node's as well.
    others.sort_by_key(|is| is.message.header.action != RuleAction::Prohibit);
    let mut removed = Vec::new();
    for Present { message, .. } in others {
        let name = describe(&message);
        match netlink.order(RouteNetlinkMessage::DelRule(message), 0) {
            Ok(()) => removed.push(name),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// A rule of ours that is there.
struct Present {
    /// `None` for one of another shape.
    rule: Option<Rule>,
    message: RuleMessage,
}

/// Ours alone: a rule of somebody else's with the same effect may go at any time.
fn dump(netlink: &Netlink, address: IpAddr) -> io::Result<Vec<Present>> {
    let mut question = RuleMessage::default();
    question.header.family = family(address);
    let answers = netlink.dump(RouteNetlinkMessage::GetRule(question))?;
    let ours = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewRule(message) if is_ours(&message, address) => Some(message),
        _ => None,
    });
    Ok(ours.map(|message| Present { rule: Rule::read(&message, address), message }).collect())
}

/// The rules of one family, in the order in which they are added: never is there a moment in which the prohibition
/// applies to the node itself.
fn wanted(to: IpAddr, preference: u32) -> [Rule; 3] {
    [
        Rule { to, preference: preference + 2, act: Act::Land },
        Rule { to, preference, act: Act::PassOwn },
        Rule { to, preference: preference + 1, act: Act::Prohibit },
    ]
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

// === impl Rule ===

impl Rule {
    fn action(self) -> RuleAction {
        match self.act {
            Act::PassOwn => RuleAction::Goto,
            Act::Prohibit => RuleAction::Prohibit,
            Act::Land => RuleAction::Nop,
        }
    }

    /// What it has beside preference, destination and mark.
    fn particulars(self) -> Vec<RuleAttribute> {
        match self.act {
            // To the kernel, what the node itself sends comes in by lo.
            Act::PassOwn => vec![
                RuleAttribute::Iifname("lo".to_owned()),
                RuleAttribute::Goto(self.preference + 2),
            ],
            Act::Prohibit | Act::Land => Vec::new(),
        }
    }

    fn message(self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = family(self.to);
        message.header.dst_len = host_prefix(self.to);
        message.header.action = self.action();
        message.attributes = vec![
            RuleAttribute::Priority(self.preference),
            RuleAttribute::Destination(self.to),
            RuleAttribute::Protocol(PROTOCOL),
        ];
        message.attributes.extend(self.particulars());
        message
    }

    /// The rule that `message` is; `None` when none of ours to `to` looks so.
    fn read(message: &RuleMessage, to: IpAddr) -> Option<Self> {
        let preference = message.attributes.iter().find_map(|attribute| match attribute {
            RuleAttribute::Priority(value) => Some(*value),
            _ => None,
        })?;
        let act = match message.header.action {
            RuleAction::Goto => Act::PassOwn,
            RuleAction::Prohibit => Act::Prohibit,
            RuleAction::Nop => Act::Land,
            _ => return None,
        };
        let rule = Self { to, preference, act };
        let told = |attribute| message.attributes.contains(attribute);
        rule.particulars().iter().all(told).then_some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        for address in imds_addresses() {
            for rule in wanted(address, 5) {
                let message = rule.message();
                assert_eq!(Rule::read(&message, address), Some(rule));
                assert!(is_ours(&message, address));
            }
        }
    }

    #[test]
    fn rules_of_others_are_not_ours_and_other_targets_are_not_the_same() {
        let [to, _] = imds_addresses();
        let mut message = Rule { to, preference: 5, act: Act::PassOwn }.message();
        message.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
        assert!(!is_ours(&message, to), "without the mark");
        message.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Goto(_)));
        message.attributes.push(RuleAttribute::Goto(9));
        assert_eq!(Rule::read(&message, to), None, "goes elsewhere");
        let other = Rule { to: [10, 0, 0, 1].into(), preference: 5, act: Act::Prohibit }.message();
        assert!(!is_ours(&other, to), "to elsewhere");
    }

    #[test]
    fn the_prohibition_comes_last() {
        let [to, _] = imds_addresses();
        assert_eq!(wanted(to, 5).map(|rule| rule.act), [Act::Land, Act::PassOwn, Act::Prohibit]);
    }
}
