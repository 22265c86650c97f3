//! The sockets that pods and operators connect to: from the agent that runs, or new ones.

use std::{
    io,
    net::{SocketAddr, TcpListener as Socket},
    os::fd::{AsFd as _, OwnedFd},
    pin::pin,
    time::Duration,
};

use kiam_common::redirect::Target;
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use super::Error;
use crate::{
    config::{Config, Hosts},
    handover::{self, Answer, Handover, Trusted},
};
use kiam_kernel::{
    intercept,
    pins::Turn,
    sys::{self, ports},
};

/// How often an agent that hangs is asked again.
const RETRY: Duration = Duration::from_millis(500);
/// How long an agent that was killed may take to let go of its sockets.
const LETTING_GO: Duration = Duration::from_secs(5);
/// How often it is asked whether another agent that starts is done.
const TURN: Duration = Duration::from_millis(50);
/// How long one that starts may take, from its sockets until it serves. One that hangs keeps nobody out for longer.
const TURN_LIMIT: Duration = Duration::from_secs(30);

/// Everything that the agent listens on.
pub(super) struct Listeners {
    /// For pods: one a family.
    pub(super) pods: Vec<TcpListener>,
    pub(super) admin: TcpListener,
    pub(super) metrics: Option<TcpListener>,
    /// Those inside pods' network namespaces, of the agent that runs.
    pub(super) inside: Vec<Socket>,
    /// The agent that goes on until it hears that this one serves.
    pub(super) handover: Option<Handover>,
    /// This agent's turn to attach; to be dropped once the next one can find it.
    pub(super) turn: Option<Turn>,
    /// Whether no agent served when this one's turn came, so that nothing was waited for.
    pub(super) cold: bool,
}

// === impl Listeners ===

impl Listeners {
    /// Asks the agent that runs for its sockets, once this one is as warm as `warm_up` can make it, and opens those that it
    /// does not give. Where none serves there is nothing to be warm for. While one runs that gives nothing, waits for what it
    /// holds: kubelet ends an agent that hangs.
    pub(super) async fn acquire(
        config: &Config,
        warm_up: impl Future<Output = ()>,
    ) -> Result<Self, Error> {
        let mut began = Instant::now();
        let mut warned = false;
        let mut warm_up = pin!(warm_up);
        let mut cold = true;
        loop {
            // Again each time: who waits for another agent's end keeps nobody from attaching.
            let turn = turn(config).await?;
            // In this agent's turn, so that none comes to serve between the question and the programs.
            if cold && handover::is_served(&config.state_dir, &trusted(config)).await {
                drop(turn);
                warm_up.as_mut().await;
                cold = false;
                began = Instant::now();
                continue;
            }
            let answer = handover::ask(&config.state_dir, &trusted(config)).await;
            let (handover, silent) = match answer {
                Answer::Nobody => (None, None),
                Answer::Silent(why) => (None, Some(why)),
                Answer::Sockets(handover) => (Some(handover), None),
            };
            let taken = match Self::open(config, handover).await {
                Err(error) if error.is_in_use() => error,
                opened => return opened.map(|opened| Self { turn, cold, ..opened }),
            };
            drop(turn);
            match silent {
                Some(why) if !warned => {
                    warn!(error = %taken, agent = %why, "An agent runs and gives no sockets; waiting for its end");
                    warned = true;
                }
                None if began.elapsed() > LETTING_GO => return Err(taken),
                _ => {}
            }
            sleep(RETRY).await;
        }
    }

    async fn open(config: &Config, mut handover: Option<Handover>) -> Result<Self, Error> {
        let elsewhere = |given: &mut Handover| given.extract(sys::is_elsewhere);
        let inside = handover.as_mut().map(elsewhere).unwrap_or_default();
        let mut pods = Vec::new();
        for address in addresses(&config.hosts, config.port) {
            pods.push(socket("--host", address, &mut handover).await?);
        }
        let admin = socket("--admin", config.admin, &mut handover).await?;
        let metrics = match config.metrics {
            Some(address) => Some(socket("--metrics", address, &mut handover).await?),
            None => None,
        };
        Ok(Self { pods, admin, metrics, inside, handover, turn: None, cold: true })
    }

    /// Where pods are redirected to.
    pub(super) fn pods(&self) -> Vec<SocketAddr> {
        self.pods.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// The same sockets, for the agent after this one.
    pub(super) fn duplicates(&self) -> io::Result<Vec<OwnedFd>> {
        let all = self.pods.iter().chain([&self.admin]).chain(&self.metrics);
        all.map(|socket| socket.as_fd().try_clone_to_owned()).collect()
    }

    /// Those of pods, where the filter of SYNs that they may have from an agent before is not wanted.
    pub(super) fn unfiltered(&self, config: &Config) -> io::Result<Vec<OwnedFd>> {
        match config.intercept.as_ref().is_some_and(intercept::Config::has_filter) {
            true => Ok(Vec::new()),
            false => self.duplicates_for_pods(),
        }
    }

    /// Those of pods alone.
    pub(super) fn duplicates_for_pods(&self) -> io::Result<Vec<OwnedFd>> {
        self.pods.iter().map(|socket| socket.as_fd().try_clone_to_owned()).collect()
    }
}

/// This agent's turn to attach: of two that start at once, the second finds the first. `None` when there is nothing to
/// attach, or the one before takes too long.
async fn turn(config: &Config) -> Result<Option<Turn>, Error> {
    let Some(config) = &config.intercept else { return Ok(None) };
    let began = Instant::now();
    let mut warned = false;
    while began.elapsed() < TURN_LIMIT {
        if let Some(turn) = Turn::take(&config.bpffs)? {
            return Ok(Some(turn));
        }
        if !warned {
            info!("Another agent starts; waiting until it serves");
            warned = true;
        }
        sleep(TURN).await;
    }
    warn!("Another agent starts and does not come to serve; going on without it");
    Ok(None)
}

/// Who may hand over, or take: see [`intercept::may_hand_over`].
pub(super) fn trusted(config: &Config) -> Trusted {
    match config.intercept.clone() {
        Some(config) => {
            Trusted::new(move |token, pid| intercept::may_hand_over(token, &config, pid))
        }
        None => Trusted::new(|_, _| true),
    }
}

fn addresses(hosts: &Hosts, port: u16) -> impl Iterator<Item = SocketAddr> + use<> {
    hosts.addresses().map(move |host| SocketAddr::new(host, port))
}

/// std sets SO_REUSEADDR, which a restart needs, and never SO_REUSEPORT.
async fn socket(
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

/// The kernel programs' target.
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
