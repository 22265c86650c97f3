//! The node's uplinks: the interfaces by which packets for the IMDS could leave the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};

use super::route::imds_addresses;
use crate::sys::netlink::Netlink;

/// An interface of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    /// The interface's index, unique while it exists.
    pub(crate) index: u32,
    /// The interface's name, which may change.
    pub(crate) name: String,
}

/// The relevant part of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    to: IpAddr,
    prefix: u8,
    interfaces: Vec<u32>,
}

/// The relevant part of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    loopback: bool,
    /// The bond, bridge or VRF that the interface is part of.
    controller: Option<u32>,
    /// The interface below, such as a VLAN's device; `None` if it is in another network namespace.
    lower: Option<u32>,
}

/// Finds the uplinks by the routes of all tables and both families, in this thread's network namespace.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn uplinks() -> io::Result<Vec<Interface>> {
    let netlink = Netlink::route()?;
    let mut routes = Vec::new();
    for address in imds_addresses() {
        let mut question = RouteMessage::default();
        question.header.address_family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let answers = netlink.dump(RouteNetlinkMessage::GetRoute(question))?;
        routes.extend(answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(message) => Route::read(&message),
            _ => None,
        }));
    }
    Ok(select(&routes, &links(&netlink)?))
}

/// Lists the interfaces of this thread's network namespace.
///
/// # Errors
///
/// The kernel's.
pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    let links = links(&Netlink::route()?)?;
    Ok(links.into_iter().map(|Link { index, name, .. }| Interface { index, name }).collect())
}

/// The names of the interfaces of this thread's network namespace.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn interface_names() -> io::Result<Vec<String>> {
    Ok(interfaces()?.into_iter().map(|interface| interface.name).collect())
}

fn links(netlink: &Netlink) -> io::Result<Vec<Link>> {
    let answers = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let links = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) => Some(Link::read(&message)),
        _ => None,
    });
    Ok(links.collect())
}

/// Selects the interfaces of routes that lead to the IMDS, and the interfaces below them: a packet socket may use the
/// device of a bond or a VLAN directly.
fn select(routes: &[Route], links: &[Link]) -> Vec<Interface> {
    let by_index: BTreeMap<u32, &Link> = links.iter().map(|link| (link.index, link)).collect();
    let leading = routes.iter().filter(|route| route.leads_to_imds());
    let mut next: Vec<u32> = leading.flat_map(|route| route.interfaces.clone()).collect();
    let mut found = BTreeSet::new();
    while let Some(index) = next.pop() {
        let Some(link) = by_index.get(&index).filter(|link| !link.loopback) else { continue };
        if found.insert(index) {
            next.extend(link.lower);
            let parts = links.iter().filter(|part| part.controller == Some(index));
            next.extend(parts.map(|part| part.index));
        }
    }
    let interface = |index: u32| Interface { index, name: by_index[&index].name.clone() };
    found.into_iter().map(interface).collect()
}

// === impl Route ===

impl Route {
    /// Parses a unicast route; `None` for others (local, prohibit, …).
    fn read(message: &RouteMessage) -> Option<Self> {
        if message.header.kind != RouteType::Unicast {
            return None;
        }
        let mut route = Self {
            to: match message.header.address_family {
                AddressFamily::Inet => IpAddr::from([0; 4]),
                _ => IpAddr::from([0; 16]),
            },
            prefix: message.header.destination_prefix_length,
            interfaces: Vec::new(),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(to)) => route.to = (*to).into(),
                RouteAttribute::Destination(RouteAddress::Inet6(to)) => route.to = (*to).into(),
                RouteAttribute::Oif(index) => route.interfaces.push(*index),
                RouteAttribute::MultiPath(hops) => {
                    route.interfaces.extend(hops.iter().map(|hop| hop.interface_index));
                }
                _ => {}
            }
        }
        Some(route)
    }

    fn leads_to_imds(&self) -> bool {
        imds_addresses().iter().any(|imds| self.covers(*imds))
    }

    fn covers(&self, address: IpAddr) -> bool {
        let differs = |ours: &[u8], theirs: &[u8]| {
            let bits = ours.iter().zip(theirs).flat_map(|(ours, theirs)| {
                let difference = ours ^ theirs;
                (0..8).map(move |bit| difference & (0x80 >> bit) != 0)
            });
            bits.take(self.prefix.into()).any(|different| different)
        };
        match (self.to, address) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => !differs(&ours.octets(), &theirs.octets()),
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => !differs(&ours.octets(), &theirs.octets()),
            _ => false,
        }
    }
}

// === impl Link ===

impl Link {
    fn read(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            controller: None,
            lower: None,
        };
        let mut elsewhere = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::Link(index) => link.lower = Some(*index),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                _ => {}
            }
        }
        // An index of another namespace means nothing here.
        link.lower = link.lower.filter(|_| !elsewhere);
        link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(to: &str, interfaces: &[u32]) -> Route {
        let (to, prefix) = to.split_once('/').unwrap();
        let (to, prefix) = (to.parse().unwrap(), prefix.parse().unwrap());
        Route { to, prefix, interfaces: interfaces.to_vec() }
    }

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.to_owned(), loopback: name == "lo", controller: None, lower: None }
    }

    #[test]
    fn routes_that_cover_the_imds_are_told_from_others() {
        let cases = [
            ("0.0.0.0/0", true),
            ("169.254.0.0/16", true),
            ("169.254.169.254/32", true),
            ("169.254.169.252/31", false),
            ("169.254.169.253/32", false),
            ("10.0.0.0/8", false),
            ("::/0", true),
            ("fd00:ec2::/32", true),
            ("fd00:ec2::254/128", true),
            ("fd00:ec2::253/128", false),
            ("fe80::/64", false),
        ];
        for (to, expected) in cases {
            assert_eq!(route(to, &[1]).leads_to_imds(), expected, "{to}");
        }
    }

    #[test]
    fn uplinks_are_the_interfaces_of_those_routes_and_what_they_are_made_of() {
        let mut links = ["lo", "eth0", "eth1", "bond0", "vlan7", "pod1", "eth2", "eth3"]
            .iter()
            .zip(1..)
            .map(|(name, index)| link(index, name))
            .collect::<Vec<_>>();
        // eth1 and eth2 are bond0's, vlan7 is on bond0, eth3 is somebody else's.
        links[2].controller = Some(4);
        links[6].controller = Some(4);
        links[4].lower = Some(4);
        let routes = [
            route("0.0.0.0/0", &[5]),
            route("::/0", &[2, 99]),
            route("10.1.0.2/32", &[6]),
            route("169.254.0.0/16", &[1]),
        ];
        let names: Vec<_> = select(&routes, &links).into_iter().map(|uplink| uplink.name).collect();
        assert_eq!(names, ["eth0", "eth1", "bond0", "vlan7", "eth2"]);
        assert_eq!(select(&[], &links), []);
    }
}
