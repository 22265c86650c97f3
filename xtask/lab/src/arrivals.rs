//! What comes to the metadata service from one moment to another, late packets included.

use std::{
    collections::BTreeMap,
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result};

use super::world::{Lab, OUTSIDE_V4};

/// Says when a packet that was sent has had its time to arrive, and what came since it was asked last.
#[derive(Debug)]
pub struct Arrivals {
    sender: UdpSocket,
    receiver: UdpSocket,
    seen: BTreeMap<IpAddr, u64>,
}

// === impl Arrivals ===

impl Arrivals {
    /// Counts from now on.
    pub fn watch(lab: &Lab) -> Result<Self> {
        let receiver = lab.node.imds_netns().udp((OUTSIDE_V4, 0).into())?;
        receiver.set_read_timeout(Some(Duration::from_secs(5))).context("a time limit")?;
        let sender = lab.node.netns().udp(([0; 4], 0).into())?;
        let address = receiver.local_addr().context("the receiver's address")?;
        sender.connect(address).context("connecting a UDP socket")?;
        Ok(Self { sender, receiver, seen: lab.imds.attackers_packets() })
    }

    /// By source, what has come from attackers to the service since the last time.
    ///
    /// A datagram goes over the same link first, so that what was sent before has come by then.
    pub fn take(&mut self, lab: &Lab) -> Result<BTreeMap<IpAddr, u64>> {
        self.sender.send(b"x").context("sending a datagram over the node's link")?;
        self.receiver.recv(&mut [0]).context("a datagram over the node's link was lost")?;
        let now = lab.imds.attackers_packets();
        let since = |source: &IpAddr, count: u64| {
            count - self.seen.get(source).copied().unwrap_or_default()
        };
        let new = now.iter().map(|(source, count)| (*source, since(source, *count)));
        let new = new.filter(|(_, count)| *count > 0).collect();
        self.seen = now;
        Ok(new)
    }
}
