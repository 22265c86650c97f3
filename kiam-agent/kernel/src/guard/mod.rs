//! The guard: what keeps pods' packets from the IMDS that no hook at connect sees (raw and packet sockets,
//! connections that are older than the agent, processes outside the pods' cgroup).
//!
//! It comes last at the start: it is for what slips past the programs. Its rules stay when the agent ends.

mod boot;
mod changes;
mod metrics;
mod probe;
mod route;
mod selection;
mod sockets;
mod uplink;

use std::{io, net::IpAddr, path::Path, pin::pin, time::Duration};

use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{debug, error, info, warn};

pub(super) use self::uplink::{AGENT, remove as remove_uplinks};
pub use self::{
    boot::{BootGuard, BootGuardError, BootText, remove_boot_guard},
    metrics::Metrics,
    uplink::UplinkProgram,
};
use self::{
    changes::{Changes, next, seen},
    probe::Reach,
};
use crate::{
    error::Error,
    sys::{Cgroup, rejection::kernel_release},
};
use kiam_core::{
    blocking::{self, Blocking},
    lifecycle::{Detail, Drain, Latch},
};

/// Between two looks at everything, whether or not the kernel told of a change.
const SWEEP: Duration = Duration::from_secs(60);
/// Between two looks at whether the program is still at the uplinks: of that the kernel tells nothing.
const LOOK: Duration = Duration::from_secs(1);
/// After a change was dealt with: so that a quarrel with another program, or many pods that come and go, do not take
/// the whole CPU.
const PAUSE: Duration = Duration::from_millis(100);

/// There where the kernel has IPv6.
const IPV6_ADDRESSES: &str = "/proc/net/if_inet6";

/// Which parts of the guard are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardConfig {
    /// Routing rules of this preference, and the four after it, prohibit what is forwarded to the IMDS.
    pub route: Option<u32>,
    /// A program at the pods' cgroup drops packets to the IMDS.
    pub skb: bool,
    /// A program at the node's uplinks drops packets of pods to the IMDS.
    pub uplink: bool,
}

/// Why the guard can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The kernel refuses the rules.
    #[error(
        "the route guard's rules to {to} can't be made on kernel {}: {source}; they need policy routing with protocols (kernel 4.17, with CONFIG_IP_MULTIPLE_TABLES), and the agent CAP_NET_ADMIN; --guard=none goes without",
        kernel_release()
    )]
    Rules {
        /// The IMDS's address.
        to: IpAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The uplinks can't be found, or the program can't be attached to one.
    #[error("the node's uplinks can't be guarded: {0}; --guard=route goes without")]
    Attach(#[source] Box<Error>),
    /// The kernel's notices can't be had.
    #[error("changes of routing can't be followed: {0}; --guard=none goes without")]
    Changes(#[source] io::Error),
    /// The rules can't be removed.
    #[error("the route guard's rules to {to} can't be removed: {source}")]
    Remove {
        /// The IMDS's address.
        to: IpAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The system has no thread for it.
    #[error("the guard's work panicked")]
    Panicked,
}

/// The guard, set up; [`Guard::keep`] keeps it so.
pub struct Guard {
    config: GuardConfig,
    cgroup: Cgroup,
    uplink: Option<UplinkProgram>,
    rules: Option<Changes>,
    routes: Option<Changes>,
    /// Whether the connections that hostNetwork pods have to the IMDS are ended too.
    ends_hosts: bool,
    /// Set once the older connections are ended.
    ended: Latch,
    metrics: Metrics,
    detail: Detail,
    reach: Reach,
}

// === impl Guard ===

impl Guard {
    /// Makes the rules, and attaches `uplink` where it is there. [`Guard::keep`] ends the connections that pods have to the
    /// IMDS, those of hostNetwork pods with `ends_hosts`, and then sets `ended`.
    ///
    /// # Errors
    ///
    /// [`GuardError`], where a part that is on can't be.
    pub async fn start(
        config: GuardConfig,
        ends_hosts: bool,
        cgroup: &Cgroup,
        uplink: Option<UplinkProgram>,
        metrics: Metrics,
        (detail, ended): (Detail, Latch),
    ) -> Result<Self, GuardError> {
        // Before the rules, so that nothing that happens to them goes unseen.
        let rules = config.route.map(|_| Changes::of_rules()).transpose();
        let routes = uplink.as_ref().map(|_| Changes::of_uplinks()).transpose();
        let mut guard = Self {
            config,
            cgroup: cgroup.clone(),
            uplink,
            rules: rules.map_err(GuardError::Changes)?,
            routes: routes.map_err(GuardError::Changes)?,
            metrics,
            detail,
            ends_hosts,
            ended,
            reach: Reach::Unknown,
        };
        let rules = blocking(move |_| keep_rules(config.route, OtherRules::Remove)).await??;
        if let Some(preference) = config.route {
            info!(preference, added = rules.added, removed = rules.removed, "Route guard is on");
            report_ipv6(rules.ipv6);
        }
        guard.attach_uplinks().await?;
        Ok(guard)
    }

    /// Ends the connections that pods have to the IMDS, puts back what somebody removes, follows the node's uplinks, and
    /// tries once a minute whether the guard holds, until the drain begins.
    pub async fn keep(mut self, mut drain: Drain) {
        // Milliseconds for each pod, which neither who is served nor what is below needs to wait for.
        let mut ending = pin!(self.end_older());
        let mut ended = false;
        let mut sweeps = interval(SWEEP);
        let mut looks = interval(LOOK);
        for ticks in [&mut sweeps, &mut looks] {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                () = drain.started() => return,
                () = &mut ending, if !ended => {
                    ended = true;
                    self.try_route().await;
                }
                _ = sweeps.tick() => {
                    self.keep_route(OtherRules::Remove).await;
                    self.keep_uplinks().await;
                    // Not before: what it tries from pods would be ended with what they had.
                    if ended {
                        self.try_route().await;
                    }
                }
                _ = looks.tick(), if self.uplink.is_some() => self.restore_uplinks().await,
                changed = next(self.rules.as_ref()) => {
                    seen(changed, &mut self.rules);
                    self.keep_route(OtherRules::Leave).await;
                    sleep(PAUSE).await;
                }
                changed = next(self.routes.as_ref()) => {
                    seen(changed, &mut self.routes);
                    self.keep_uplinks().await;
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// A task, as the guard goes on meanwhile. Where it fails, the agent does not get ready.
    fn end_older(&self) -> impl Future<Output = ()> + use<> {
        let (pods, hosts) = (self.cgroup.clone(), self.ends_hosts);
        let (metrics, ended) = (self.metrics.clone(), self.ended.clone());
        let asked = self.config != GuardConfig::default();
        async move {
            if asked {
                match blocking(move |token| sockets::destroy(token, &pods, hosts)).await {
                    Ok(destroyed) => destroyed.report(&metrics),
                    Err(error) => {
                        error!(%error, "Pods may have connections to the IMDS that are older than the agent");
                        return;
                    }
                }
            }
            ended.set();
        }
    }

    async fn keep_route(&self, others: OtherRules) {
        let preference = self.config.route;
        match blocking(move |_| keep_rules(preference, others)).await {
            Ok(Ok(rules)) if rules.added > 0 => {
                self.metrics.restored.inc_by(rules.added as u64);
                warn!(
                    rules = rules.added,
                    "Somebody removed routing rules of the guard; they are back"
                );
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) | Err(error) => error!(%error, "The route guard is not complete"),
        }
    }

    async fn keep_uplinks(&mut self) {
        if let Err(error) = self.attach_uplinks().await {
            error!(%error, "The uplink guard is not complete");
        }
    }

    async fn restore_uplinks(&mut self) {
        let Some(mut program) = self.uplink.take() else { return };
        let restored = blocking(move |_| {
            let result = program.restore();
            (program, result)
        });
        // A panic in it was logged, and leaves what is attached as it is.
        let Ok((program, result)) = restored.await else { return };
        self.uplink = Some(program);
        match result {
            Ok(interfaces) if interfaces.is_empty() => {}
            Ok(interfaces) => {
                self.metrics.restored.inc_by(interfaces.len() as u64);
                warn!(?interfaces, "Somebody took the uplink guard away; it is back");
            }
            Err(error) => error!(%error, "The uplink guard is not complete"),
        }
    }

    async fn attach_uplinks(&mut self) -> Result<(), GuardError> {
        let Some(mut program) = self.uplink.take() else { return Ok(()) };
        let (program, result) = blocking(move |_| {
            let result = program.keep();
            (program, result)
        })
        .await?;
        let count = program.count();
        self.uplink = Some(program);
        self.metrics.uplinks.set(i64::try_from(count).unwrap_or(i64::MAX));
        let new = result.map_err(|error| GuardError::Attach(Box::new(error)))?;
        if !new.is_empty() {
            info!(interfaces = ?new, "Uplink guard is on");
        }
        if count == 0 {
            warn!("The node has no route to the IMDS, so that there is no uplink to guard yet");
        }
        Ok(())
    }

    async fn try_route(&mut self) {
        if self.config.route.is_none() {
            return;
        }
        let cgroup = self.cgroup.clone();
        let reach = blocking(move |token| probe::probe(token, cgroup.path()))
            .await
            .unwrap_or(Reach::Unknown);
        self.metrics.set_route(reach);
        self.detail.set(match reach {
            Reach::Open => "open: pods' packets come to the IMDS past this node's routing",
            Reach::Holds | Reach::Unknown => reach.name(),
        });
        let before = std::mem::replace(&mut self.reach, reach);
        match (before, reach) {
            (before, reach) if before == reach => {}
            (_, Reach::Open) => error!(
                "The route guard does not hold on this node: a packet from a pod's network came to the IMDS past the routing rules; add uplink to --guard, and set the instances' hop limit to 1"
            ),
            (Reach::Open, _) => warn!(state = reach.name(), "The route guard is not open any more"),
            (_, reach) => debug!(state = reach.name(), "The route guard was tried from a pod"),
        }
    }
}

/// Removes what the guard leaves on a node, whatever its preference, and says what that was.
///
/// # Errors
///
/// [`GuardError::Remove`].
pub(super) fn uninstall() -> Result<Vec<String>, GuardError> {
    let mut removed = Vec::new();
    for to in route::imds_addresses() {
        match route::remove_but(to, None) {
            Ok(rules) => removed.extend(rules),
            Err(error) if is_family_off(&error) => {}
            Err(source) => return Err(GuardError::Remove { to, source }),
        }
    }
    removed.extend(uplink::remove_filters());
    Ok(removed)
}

/// What becomes of the rules of ours with another preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OtherRules {
    /// They are of an earlier agent.
    Remove,
    /// They may be of an agent that takes over from this one, or that this one takes over from: if both removed the
    /// other's at each change, at moments there would be none.
    Leave,
}

/// What [`keep_rules`] found.
#[derive(Clone, Copy, Debug)]
struct RuleChanges {
    /// Rules that were missing and are there now.
    added: usize,
    /// Rules with another preference that are gone now.
    removed: usize,
    /// Whether the kernel has rules for IPv6.
    ipv6: bool,
}

/// Both families' rules: the new ones first. Without a preference there are to be none.
fn keep_rules(preference: Option<u32>, others: OtherRules) -> Result<RuleChanges, GuardError> {
    let mut rules = RuleChanges { added: 0, removed: 0, ipv6: true };
    for to in route::imds_addresses() {
        match keep_family(to, preference, others) {
            Ok((added, removed)) => {
                rules.added += added;
                rules.removed += removed;
            }
            Err(error) if is_family_off(&error) && (to.is_ipv6() || preference.is_none()) => {
                rules.ipv6 &= to.is_ipv4();
            }
            Err(source) => return Err(GuardError::Rules { to, source }),
        }
    }
    Ok(rules)
}

/// How many rules of `to`'s family were added and removed.
fn keep_family(
    to: IpAddr,
    preference: Option<u32>,
    others: OtherRules,
) -> io::Result<(usize, usize)> {
    let added = preference.map_or(Ok(0), |preference| route::add(to, preference))?;
    let removed = match others {
        OtherRules::Remove => route::remove_but(to, preference)?.len(),
        OtherRules::Leave => 0,
    };
    Ok((added, removed))
}

fn is_family_off(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

fn report_ipv6(has_rules: bool) {
    if has_rules {
        return;
    }
    match Path::new(IPV6_ADDRESSES).exists() {
        true => warn!(
            kernel = kernel_release(),
            "The kernel has no routing rules for IPv6 (CONFIG_IPV6_MULTIPLE_TABLES): the route guard is for IPv4 alone"
        ),
        false => info!("The node has no IPv6: the route guard is for IPv4 alone"),
    }
}

/// Work that waits for the kernel, off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Blocking) -> T + Send + 'static,
) -> Result<T, GuardError> {
    blocking::spawn(work).await.map_err(|_| GuardError::Panicked)
}
