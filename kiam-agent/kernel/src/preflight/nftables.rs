//! Reads nftables' rules, by netlink: those that `nft` and `iptables-nft` made.

use std::io;

use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlaBuffer, NlasIterator,
};

use crate::sys::netlink::Netlink;

/// `NFNL_SUBSYS_NFTABLES` as the upper byte of a message's type.
const NFTABLES: u16 = 10 << 8;
/// `NFT_MSG_GETRULE`, and the chains' and tables'.
const GET_RULE: u16 = 7;
const GET_CHAIN: u16 = 4;
const GET_TABLE: u16 = 1;
/// The length of `struct nfgenmsg`.
const HEADER: usize = 4;
/// The length of an attribute's own length and kind.
const ATTRIBUTE: usize = 4;

/// A rule.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rule {
    /// The family of its table, such as `ip`.
    pub(super) family: &'static str,
    /// The table's name.
    pub(super) table: String,
    /// The chain's name.
    pub(super) chain: String,
    /// The values that it compares with.
    pub(super) compared: Vec<Vec<u8>>,
    /// Its expressions' names, such as `nat`, and its targets of iptables, such as `DNAT`.
    pub(super) does: Vec<String>,
    /// The data of a target of iptables.
    pub(super) target: Vec<u8>,
}

/// A message of nftables.
#[derive(Clone, Debug)]
struct Message {
    kind: u16,
    /// The family of `struct nfgenmsg`.
    family: u8,
    attributes: Vec<u8>,
}

/// Hands each rule of all tables to `take`, in this thread's network namespace: kube-proxy may have made any number.
///
/// # Errors
///
/// The kernel's, for example without `CAP_NET_ADMIN`, or where it has no nftables.
pub(super) fn each_rule(mut take: impl FnMut(Rule)) -> io::Result<()> {
    each(GET_RULE, |message| take(Rule::read(message)))
}

/// Hands the name of each table and chain to `take`.
///
/// # Errors
///
/// As of [`each_rule`].
pub(super) fn each_name(mut take: impl FnMut(&str)) -> io::Result<()> {
    // `NFTA_TABLE_NAME` is 1, and `NFTA_CHAIN_NAME` is 3.
    for (question, name) in [(GET_TABLE, 1), (GET_CHAIN, 3)] {
        each(question, |message| {
            if let Some(name) = attribute(&message.attributes, name) {
                take(&text(name));
            }
        })?;
    }
    Ok(())
}

fn each(question: u16, mut take: impl FnMut(&Message)) -> io::Result<()> {
    let question = Message { kind: NFTABLES | question, family: 0, attributes: Vec::new() };
    Netlink::netfilter()?.each(question, |message| {
        take(&message);
        Ok(())
    })
}

// === impl Rule ===

impl Rule {
    fn read(message: &Message) -> Self {
        // `NFTA_RULE_TABLE`, `NFTA_RULE_CHAIN` and `NFTA_RULE_EXPRESSIONS`.
        let [table, chain, expressions] =
            [1, 2, 4].map(|kind| attribute(&message.attributes, kind).unwrap_or_default());
        let family = match message.family {
            1 => "inet",
            2 => "ip",
            7 => "bridge",
            10 => "ip6",
            _ => "netdev",
        };
        let mut rule = Self { family, table: text(table), chain: text(chain), ..Self::default() };
        for (_, expression) in attributes(expressions) {
            // `NFTA_EXPR_NAME` and `NFTA_EXPR_DATA`.
            let [name, data] = [1, 2].map(|kind| attribute(expression, kind).unwrap_or_default());
            rule.add(&text(name), data);
        }
        rule
    }

    fn add(&mut self, name: &str, data: &[u8]) {
        match name {
            // `NFTA_CMP_DATA` with `NFTA_DATA_VALUE`.
            "cmp" => {
                let value = attribute(data, 3).and_then(|data| attribute(data, 1));
                self.compared.extend(value.map(<[u8]>::to_vec));
            }
            // `NFTA_TARGET_NAME` and `NFTA_TARGET_INFO`.
            "target" => {
                self.does.extend(attribute(data, 1).map(text));
                self.target = attribute(data, 3).unwrap_or_default().to_vec();
            }
            name => self.does.push(name.to_owned()),
        }
    }
}

/// The attributes in `bytes`, by kind and value. Whatever can't be read ends the list.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(|found: Result<NlaBuffer<&[u8]>, _>| {
        let found = found.ok()?;
        let value = found.into_inner().get(ATTRIBUTE..found.length().into())?;
        Some((found.kind(), value))
    })
}

/// The value of the first attribute of this kind.
fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

// === impl Message ===

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].copy_from_slice(&[self.family, 0, 0, 0]);
        buffer[HEADER..].copy_from_slice(&self.attributes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let (generic, attributes) = payload
            .split_at_checked(HEADER)
            .ok_or_else(|| DecodeError::from("a message of nftables without its header"))?;
        Ok(Self { kind: header.message_type, family: generic[0], attributes: attributes.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nest(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = (ATTRIBUTE + value.len()) as u16;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_rule_is_read_and_broken_ones_are_no_panic() {
        let expression = |name: &str, data: &[u8]| {
            nest(1, &[nest(1, format!("{name}\0").as_bytes()), nest(2, data)].concat())
        };
        let compares = nest(3, &nest(1, &[169, 254, 169, 254]));
        let target = [nest(1, b"DNAT\0"), nest(3, &[1, 2, 3])].concat();
        let expressions = [
            expression("cmp", &compares),
            expression("counter", &[]),
            expression("target", &target),
        ];
        let attributes =
            [nest(1, b"nat\0"), nest(2, b"PREROUTING\0"), nest(4, &expressions.concat())].concat();
        let message = Message { kind: NFTABLES, family: 2, attributes };
        let rule = Rule::read(&message);
        assert_eq!(
            (rule.family, rule.table.as_str(), rule.chain.as_str()),
            ("ip", "nat", "PREROUTING")
        );
        assert_eq!(rule.compared, [[169, 254, 169, 254]]);
        assert_eq!(
            (rule.does, rule.target),
            (vec!["counter".to_owned(), "DNAT".to_owned()], vec![1, 2, 3])
        );
        for end in 0..message.attributes.len() {
            Rule::read(&Message {
                attributes: message.attributes[..end].to_vec(),
                ..message.clone()
            });
        }
    }
}
