//! The second step: the sockets that pods and operators connect to, from the agent that serves, or new ones.

use std::{
    io,
    net::{SocketAddr, TcpListener as Socket},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    pin::pin,
    time::Duration,
};

use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use super::{
    error::Error,
    prepared::{Addresses, Core, Interceptor, Prepared, Service},
};
use crate::handover::{Handover, HandoverAnswer, Peers};
use kiam_kernel::{
    pins::AttachLock,
    sys::{self, ports},
};

/// How often an agent that hangs is asked again.
const RETRY: Duration = Duration::from_millis(500);
/// How long an agent that was killed may take to close its sockets.
const CLOSING: Duration = Duration::from_secs(5);
/// An agent that has its sockets and, until it has taken over, the attach lock.
pub(super) struct Bound {
    pub(super) core: Core,
    pub(super) interceptor: Option<Interceptor>,
    pub(super) service: Service,
    pub(super) listeners: Listeners,
    /// The pod listeners of the agent that serves.
    pub(super) pod_listeners: Vec<Socket>,
    pub(super) takeover: Takeover,
}

/// The node's sockets.
pub(super) struct Listeners {
    /// For pods: one a family.
    pub(super) pods: Vec<TcpListener>,
    pub(super) admin: TcpListener,
    pub(super) metrics: Option<TcpListener>,
}

/// The node's sockets and the pod listeners of the agent that serves.
type Sockets = (Listeners, Vec<Socket>);

/// What this agent has until it has taken over.
pub(super) struct Takeover {
    /// The agent that goes on until it is told that this one serves.
    pub(super) handover: Option<Handover>,
    /// To be dropped once the next agent can find this one. `None` when there is nothing to attach, or the one before takes
    /// too long.
    pub(super) lock: Option<AttachLock>,
    /// Whether no agent served when this one got the lock, so that nothing was waited for.
    pub(super) cold: bool,
    /// Copies of the node's sockets, for the agent after this one.
    pub(super) spare: Vec<OwnedFd>,
    /// The sockets that have a filter of SYNs, from an agent before, and are not to have one.
    pub(super) unfiltered: Vec<OwnedFd>,
}

// === impl Prepared ===

impl Prepared {
    /// Takes the attach lock, and the sockets of the agent that serves, once this one is as warm as it can be made; opens
    /// those that it does not get. Where no agent serves there is nothing to be warm for. While one runs that gives nothing,
    /// waits for its end: the kubelet ends an agent that hangs.
    pub(super) async fn bind(self) -> Result<Bound, Error> {
        let Self { core, addresses, interceptor, service } = self;
        let bpffs = interceptor.as_ref().map(|it| it.config.bpffs.as_path());
        let warm_up = core.first_pass.warm_up(&core.peers);
        let (sockets, mut takeover) = acquire(&core.peers, &addresses, bpffs, warm_up).await?;
        let (listeners, pod_listeners) = sockets;
        takeover.spare = listeners.copies().map_err(Error::Handover)?;
        if !interceptor.as_ref().is_some_and(|it| it.config.has_filter()) {
            takeover.unfiltered = listeners.copies_for_pods().map_err(Error::Handover)?;
        }
        Ok(Bound { core, interceptor, service, listeners, pod_listeners, takeover })
    }
}

// === impl Listeners ===

impl Listeners {
    /// Where pods are redirected to.
    pub(super) fn pod_addresses(&self) -> Vec<SocketAddr> {
        self.pods.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// Copies of all, for the agent after this one.
    pub(super) fn copies(&self) -> io::Result<Vec<OwnedFd>> {
        copies(self.pods.iter().chain([&self.admin]).chain(&self.metrics))
    }

    /// Copies of those for pods.
    pub(super) fn copies_for_pods(&self) -> io::Result<Vec<OwnedFd>> {
        copies(self.pods.iter())
    }
}

fn copies<'a>(sockets: impl Iterator<Item = &'a TcpListener>) -> io::Result<Vec<OwnedFd>> {
    sockets.map(|socket| socket.as_fd().try_clone_to_owned()).collect()
}

async fn acquire(
    peers: &Peers,
    addresses: &Addresses,
    bpffs: Option<&Path>,
    warm_up: impl Future<Output = ()>,
) -> Result<(Sockets, Takeover), Error> {
    let mut warm_up = pin!(warm_up);
    let (mut began, mut warned, mut cold) = (Instant::now(), false, true);
    loop {
        // Again each time: an agent that waits for another one's end keeps nobody from attaching.
        let lock = match bpffs {
            Some(bpffs) => AttachLock::wait(bpffs).await?,
            None => None,
        };
        // Under the lock, so that none comes to serve between the question and the programs.
        if cold && peers.is_served().await {
            drop(lock);
            warm_up.as_mut().await;
            (cold, began) = (false, Instant::now());
            continue;
        }
        let (mut handover, silent) = ask(peers).await;
        let taken = match open(addresses, &mut handover) {
            Err(error) if error.is_in_use() => error,
            opened => {
                let (spare, unfiltered) = (Vec::new(), Vec::new());
                return Ok((opened?, Takeover { handover, lock, cold, spare, unfiltered }));
            }
        };
        drop((handover, lock));
        match silent {
            Some(why) if !warned => {
                warn!(error = %taken, agent = %why, "The running agent does not hand over its sockets; waiting for it to exit");
                warned = true;
            }
            None if began.elapsed() > CLOSING => return Err(taken),
            _ => {}
        }
        sleep(RETRY).await;
    }
}

/// The sockets of the agent that serves, or why it gives none.
async fn ask(peers: &Peers) -> (Option<Handover>, Option<String>) {
    match peers.ask().await {
        HandoverAnswer::Nobody => (None, None),
        HandoverAnswer::Silent(why) => (None, Some(why)),
        HandoverAnswer::Sockets(handover) => (Some(handover), None),
    }
}

/// Takes the sockets from `handover`, and opens those that it does not have.
fn open(addresses: &Addresses, handover: &mut Option<Handover>) -> Result<Sockets, Error> {
    let elsewhere = |given: &mut Handover| given.extract(sys::is_elsewhere);
    let pod_listeners = handover.as_mut().map(elsewhere).unwrap_or_default();
    let mut pods = Vec::new();
    for host in addresses.hosts.addresses() {
        pods.push(socket("--host", SocketAddr::new(host, addresses.port), handover)?);
    }
    let admin = socket("--admin", addresses.admin, handover)?;
    let metrics = addresses.metrics.map(|address| socket("--metrics", address, handover));
    Ok((Listeners { pods, admin, metrics: metrics.transpose()? }, pod_listeners))
}

/// std sets SO_REUSEADDR, which a restart needs, and never SO_REUSEPORT.
fn socket(
    flag: &'static str,
    address: SocketAddr,
    handover: &mut Option<Handover>,
) -> Result<TcpListener, Error> {
    let failed = |source| Error::Bind { flag, address: address.to_string(), source };
    let socket = match handover.as_mut().and_then(|handover| handover.take(address)) {
        None => ports::listen(address).map_err(failed)?,
        Some(given) => {
            info!(%address, "Socket taken over from the agent that runs");
            given
        }
    };
    socket.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(socket).map_err(failed)
}
