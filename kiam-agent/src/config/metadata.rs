//! The flags of the metadata service for pods.

use std::time::Duration;

use super::{
    Identity, SECOND,
    flags::Flags,
    values::{Hosts, Mistakes},
};
use kiam_requests::imds;

/// The [`imds::Config`]; `None` if a mistake leaves a part out.
pub(super) fn metadata(
    flags: &Flags,
    identity: Identity,
    hosts: &Hosts,
    intercepts: bool,
    mistakes: &mut Mistakes,
) -> Option<imds::Config> {
    let hold = mistakes.duration("hold", &flags.hold, Duration::ZERO, SECOND * 30);
    let words = [("optional", imds::Imdsv2::Optional), ("required", imds::Imdsv2::Required)];
    let imdsv2 = mistakes.one_of("imdsv2", &flags.imdsv2, &words);
    let allow_paths = mistakes.all("allow-path", &flags.allow_path);
    let deny_paths = mistakes.all("deny-path", &flags.deny_path);
    let node_roles = mistakes.all("node-role", &flags.node_role);
    if !flags.node_role.is_empty() && identity == Identity::SourceIp {
        mistakes.add(
            "node-role",
            "it needs --identity=kernel: an address may belong to another pod by now",
        );
    }
    let allow_ip_query = mistakes.switch("allow-ip-query", &flags.allow_ip_query);
    if allow_ip_query && intercepts {
        mistakes.add(
            "allow-ip-query",
            "it needs --interceptor=off: otherwise any pod gets another's credentials",
        );
    }
    Some(imds::Config {
        hold: hold?,
        imdsv2: imdsv2?,
        allow_paths: allow_paths?,
        deny_paths: deny_paths?,
        allow_ip_query,
        node_roles: node_roles?,
        own_addresses: match identity {
            Identity::Kernel => Vec::new(),
            Identity::SourceIp => hosts.addresses().collect(),
        },
    })
}
