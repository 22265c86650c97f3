//! The node's sockets: those of the agent that serves, or new ones.

use std::{
    io,
    net::{SocketAddr, TcpListener as Socket},
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use super::{FirstPass, Handover, HandoverAnswer, Peers};
use kiam_kernel::{
    intercept,
    pins::AttachLock,
    sys::{self, ports},
};

/// How often an agent that hangs is asked again.
const RETRY: Duration = Duration::from_millis(500);
/// How long an agent that was killed may take to close its sockets.
const CLOSING: Duration = Duration::from_secs(5);

/// Where the agent is to listen.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// For pods: one a family.
    pub pods: Vec<SocketAddr>,
    /// `--admin`.
    pub admin: SocketAddr,
    /// `--metrics`.
    pub metrics: Option<SocketAddr>,
}

/// The sockets that listen at [`Addresses`].
#[derive(Debug)]
pub struct Listeners {
    /// For pods: one a family.
    pub pods: Vec<TcpListener>,
    /// For operators.
    pub operators: OperatorSockets,
    /// The pod listeners of the agent that serves.
    pub inherited: Vec<Socket>,
}

/// The sockets for operators.
#[derive(Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct OperatorSockets {
    pub admin: TcpListener,
    pub metrics: Option<TcpListener>,
}

/// What this agent has until it has taken over.
#[derive(Debug)]
pub struct Takeover {
    /// The agent that goes on until it is told that this one serves.
    pub handover: Option<Handover>,
    /// To be dropped once the next agent can find this one. `None` when there is nothing to attach, or the one before takes
    /// too long.
    pub lock: Option<AttachLock>,
    /// Whether no agent served when this one got the lock, so that nothing was waited for.
    pub cold: bool,
    /// Copies of the node's sockets, for the agent after this one.
    pub spare: Vec<OwnedFd>,
    /// The sockets that have a filter of SYNs, from an agent before, and are not to have one.
    pub unfiltered: Vec<OwnedFd>,
}

/// Why the agent has not got its sockets.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The attach lock can't be taken.
    #[error(transparent)]
    Lock(#[from] intercept::Error),
    /// An address can't be listened at.
    #[error("{flag} {address}: {source}")]
    #[expect(missing_docs, reason = "a field is what its name says")]
    Bind {
        flag: &'static str,
        address: String,
        #[source]
        source: io::Error,
    },
    /// The system gives no descriptors.
    #[error("the sockets for the agent after this one: {0}")]
    Copies(#[source] io::Error),
}

// === impl Error ===

impl Error {
    /// Whether somebody else listens at an address.
    fn is_in_use(&self) -> bool {
        matches!(self, Self::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}

// === impl Listeners ===

impl Listeners {
    /// Takes the sockets from `handover`, and opens those that it does not have.
    fn open(addresses: &Addresses, handover: &mut Option<Handover>) -> Result<Self, Error> {
        let elsewhere = |given: &mut Handover| given.extract(sys::is_elsewhere);
        let inherited = handover.as_mut().map(elsewhere).unwrap_or_default();
        let mut socket = |flag, address| socket(flag, address, handover);
        let pods = addresses.pods.iter().map(|address| socket("--host", *address));
        let pods = pods.collect::<Result<_, _>>()?;
        let admin = socket("--admin", addresses.admin)?;
        let metrics = addresses.metrics.map(|address| socket("--metrics", address)).transpose()?;
        Ok(Self { pods, operators: OperatorSockets { admin, metrics }, inherited })
    }

    /// Where pods are redirected to.
    #[must_use]
    pub fn pod_addresses(&self) -> Vec<SocketAddr> {
        self.pods.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// Copies of all, for the agent after this one.
    fn copies(&self) -> Result<Vec<OwnedFd>, Error> {
        let OperatorSockets { admin, metrics } = &self.operators;
        copies(self.pods.iter().chain([admin]).chain(metrics))
    }

    /// Copies of those for pods.
    ///
    /// # Errors
    ///
    /// [`Error::Copies`].
    pub fn copies_for_pods(&self) -> Result<Vec<OwnedFd>, Error> {
        copies(self.pods.iter())
    }
}

fn copies<'a>(sockets: impl Iterator<Item = &'a TcpListener>) -> Result<Vec<OwnedFd>, Error> {
    let copies = sockets.map(|socket| socket.as_fd().try_clone_to_owned());
    copies.collect::<io::Result<_>>().map_err(Error::Copies)
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

// === impl Takeover ===

impl Takeover {
    /// Takes the attach lock, and the sockets of the agent that serves, once this one is as warm as it can be made; opens
    /// those that it does not get. Where no agent serves there is nothing to be warm for. While one runs that gives nothing,
    /// waits for its end: the kubelet ends an agent that hangs.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn begin(
        peers: &Peers,
        addresses: &Addresses,
        interceptor: Option<&intercept::Config>,
        first_pass: &FirstPass,
    ) -> Result<(Listeners, Self), Error> {
        let (mut began, mut warned, mut cold) = (Instant::now(), false, true);
        loop {
            // Again each time: an agent that waits for another one's end keeps nobody from attaching.
            let lock = match interceptor {
                Some(config) => AttachLock::wait(&config.bpffs).await?,
                None => None,
            };
            // Under the lock, so that none comes to serve between the question and the programs.
            if cold && peers.is_served().await {
                drop(lock);
                first_pass.warm_up(peers).await;
                (cold, began) = (false, Instant::now());
                continue;
            }
            let (mut handover, silent) = match peers.ask().await {
                HandoverAnswer::Nobody => (None, None),
                HandoverAnswer::Silent(why) => (None, Some(why)),
                HandoverAnswer::Sockets(handover) => (Some(handover), None),
            };
            let taken = match Listeners::open(addresses, &mut handover) {
                Err(error) if error.is_in_use() => error,
                opened => {
                    let listeners = opened?;
                    let filters = interceptor.is_some_and(intercept::Config::has_filter);
                    let spare = listeners.copies()?;
                    let unfiltered =
                        if filters { Vec::new() } else { listeners.copies_for_pods()? };
                    return Ok((listeners, Self { handover, lock, cold, spare, unfiltered }));
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
}
