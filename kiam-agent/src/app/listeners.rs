//! The sockets that pods and operators connect to.

use std::net::SocketAddr;

use kiam_common::redirect::Target;
use tokio::net::TcpListener;

use super::Error;
use crate::config::Hosts;

pub(super) async fn bind(hosts: &Hosts, port: u16) -> Result<Vec<TcpListener>, Error> {
    let mut listeners = Vec::new();
    for host in hosts.addresses() {
        listeners.push(listen("--host", SocketAddr::new(host, port)).await?);
    }
    Ok(listeners)
}

/// tokio sets SO_REUSEADDR, which a restart needs, and never SO_REUSEPORT.
pub(super) async fn listen(flag: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let failed = |source| Error::Bind { flag, address: address.to_string(), source };
    TcpListener::bind(address).await.map_err(failed)
}

pub(super) fn target(bound: &[SocketAddr]) -> Target {
    let mut target = Target::default();
    for address in bound {
        match address {
            SocketAddr::V4(v4) => {
                target.v4 = v4.ip().octets();
                target.v4_port = v4.port();
            }
            SocketAddr::V6(v6) => {
                target.v6 = v6.ip().octets();
                target.v6_port = v6.port();
            }
        }
    }
    target
}
