//! The addresses that the agent is to listen at.

use std::{io, net::SocketAddr};

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, socket_with,
    sockopt::{set_ipv6_v6only, set_socket_reuseaddr},
};

use super::{Config, listed};
use crate::{intercept::is_installed, sys::ports};
use kiam_core::preflight::{
    Check,
    Topic::{EphemeralPorts, Ports},
};

pub(super) fn checks(node: &Config) -> Vec<Check> {
    vec![listening(node), ephemeral(node)]
}

fn listening(node: &Config) -> Check {
    let all: Vec<String> = node.addresses.iter().map(|(_, address)| address.to_string()).collect();
    let mut kept = false;
    let tried = node
        .addresses
        .iter()
        .filter_map(|(flag, address)| try_bind(*address).err().map(|error| (flag, address, error)));
    for (flag, address, error) in tried {
        let finding = format!("{flag} {address}: {error}");
        return match error.kind() {
            io::ErrorKind::AddrInUse if node.is_served => {
                kept = true;
                continue;
            }
            io::ErrorKind::AddrInUse => Check::fail(
                Ports,
                finding,
                format!(
                    "`ss -lntp` shows who listens there: kiam's port is 3100 in some versions; choose another with {}",
                    port_flag(flag)
                ),
            ),
            io::ErrorKind::AddrNotAvailable => Check::fail(
                Ports,
                format!("{finding}: no interface here has it"),
                format!("set {flag} to the node's own address, and hostNetwork: true for the pod"),
            ),
            // An agent that is gone left its programs, which keep the port for the next one.
            io::ErrorKind::PermissionDenied if is_installed(&node.bpffs) => {
                kept = true;
                continue;
            }
            _ => Check::fail(Ports, finding, format!("choose another with {}", port_flag(flag))),
        };
    }
    match (kept, node.is_served) {
        (true, true) => {
            Check::ok(Ports, "an agent serves here already, which hands over the sockets in use")
        }
        (true, false) => {
            Check::ok(Ports, "an earlier agent's programs keep its ports for the next one")
        }
        (false, _) => Check::ok(Ports, format!("nothing else listens at {}", listed(&all, 4))),
    }
}

/// The flag with the port of the address of `flag`.
fn port_flag<'a>(flag: &&'a str) -> &'a str {
    if *flag == "--host" { "--port" } else { flag }
}

/// Binds a socket as the agent does, and closes it without listening.
fn try_bind(address: SocketAddr) -> io::Result<()> {
    match bind_once(address) {
        // An agent's hooks reject its ports at whatever address.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bind_once(SocketAddr::new(address.ip(), 0)).and(Err(error))
        }
        bound => bound,
    }
}

fn bind_once(address: SocketAddr) -> io::Result<()> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, false)?;
    }
    Ok(bind(&socket, &address)?)
}

fn ephemeral(node: &Config) -> Check {
    let range = ports::ephemeral();
    let (low, high) = (range.start(), range.end());
    let inside: Vec<String> = node
        .addresses
        .iter()
        .filter(|(_, address)| ports::is_ephemeral(address.port(), &range))
        .map(|(flag, address)| format!("{} ({})", address.port(), port_flag(flag)))
        .collect();
    match inside.is_empty() {
        true => Check::ok(EphemeralPorts, format!("the range is {low} to {high}")),
        false => Check::warn(
            EphemeralPorts,
            format!(
                "{} in the ephemeral range {low} to {high}: a connection may hold the port when an agent starts",
                listed(&inside, 4)
            ),
            "choose another port, or add it to net.ipv4.ip_local_reserved_ports",
        ),
    }
}
