//! The guard: blocks IMDS traffic that the connect hooks cannot see (raw and packet sockets, connections older than the
//! agent, processes outside the pods' cgroup).
//!
//! It starts last, after the programs. Its rules stay when the agent ends.

mod boot;
mod changes;
mod hops;
mod metrics;
mod others;
mod probe;
mod route;
mod selection;
mod sockets;
mod uplink;

use std::{io, net::IpAddr, pin::pin, time::Duration};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{debug, error, info, warn};

use self::changes::{Changes, next, seen};
pub use self::{
    boot::{BootGuard, BootGuardError, BootText, is_boot_note, remove_boot_guard},
    metrics::Metrics,
    uplink::UplinkProgram,
};
pub(super) use self::{
    boot::{check as check_boot_guard, take_note},
    hops::try_from_pods,
    others::rules_before,
    probe::Reach,
    route::imds_addresses,
    selection::{interface_names, uplinks},
    uplink::remove as remove_uplinks,
};
use crate::{
    error::Error,
    sys::{Cgroup, rejection::kernel_release},
};
use kiam_core::{
    blocking::{self, Blocking},
    lifecycle::{Detail, Drain, Latch},
};

/// The time between two full checks, with or without notifications.
const SWEEP: Duration = Duration::from_secs(60);
/// The time between two checks of the programs at the uplinks, for which the kernel has no notifications.
const UPLINK_CHECK: Duration = Duration::from_secs(1);
/// The pause after a change, so that a conflict with another program, or a churn of pods, does not use a whole CPU.
const PAUSE: Duration = Duration::from_millis(100);

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
    /// The rules can't be added.
    #[error(
        "the route guard's rules to {to} can't be added on kernel {}: {source}; they need policy routing with protocols (kernel 4.17, with CONFIG_IP_MULTIPLE_TABLES), and the agent CAP_NET_ADMIN; --guard=none goes without",
        kernel_release()
    )]
    Rules {
        /// The IMDS's address.
        to: IpAddr,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The uplinks can't be found, or the program can't be attached to one.
    #[error("the node's uplinks can't be guarded: {0}; --guard=route goes without")]
    Attach(#[source] Box<Error>),
    /// The kernel's notifications are unavailable.
    #[error("changes of routing can't be watched: {0}; --guard=none goes without")]
    Changes(#[source] io::Error),
    /// The rules can't be removed.
    #[error("the route guard's rules to {to} can't be removed: {source}")]
    Remove {
        /// The IMDS's address.
        to: IpAddr,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The task panicked.
    #[error("the guard's work panicked")]
    Panicked,
}

/// A guard that is set up. [`Guard::keep`] maintains it.
pub struct Guard {
    config: GuardConfig,
    cgroup: Cgroup,
    uplink: Option<UplinkProgram>,
    rules: Option<Changes>,
    routes: Option<Changes>,
    /// Whether hostNetwork pods' connections to the IMDS are ended too.
    ends_hosts: bool,
    /// Set once the older connections are ended.
    ended: Latch,
    metrics: Metrics,
    detail: Detail,
    reach: Reach,
    bypassed: watch::Sender<bool>,
}

// === impl Guard ===

impl Guard {
    /// Adds the rules, and attaches `uplink` if given. [`Guard::keep`] ends pods' connections to the IMDS, those of
    /// hostNetwork pods with `ends_hosts`, and then sets `ended`.
    ///
    /// # Errors
    ///
    /// [`GuardError`], if an enabled part can't be set up.
    pub async fn start(
        config: GuardConfig,
        ends_hosts: bool,
        cgroup: &Cgroup,
        uplink: Option<UplinkProgram>,
        metrics: Metrics,
        (detail, ended): (Detail, Latch),
    ) -> Result<Self, GuardError> {
        // Before the rules, so that no change of them is missed.
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
            bypassed: watch::Sender::default(),
        };
        let rules = blocking(move |_| keep_rules(config.route, OtherRules::Remove)).await??;
        if let Some(preference) = config.route {
            info!(
                preference,
                added = rules.added,
                removed = rules.removed,
                "The route guard is on"
            );
            route::report_ipv6(rules.ipv6);
        }
        guard.attach_uplinks().await?;
        Ok(guard)
    }

    /// Whether a packet from a pod's network came past the routing rules.
    #[must_use]
    pub fn bypassed(&self) -> watch::Receiver<bool> {
        self.bypassed.subscribe()
    }

    /// Ends pods' connections to the IMDS, restores removed rules, follows the node's uplinks, and tests once a minute
    /// whether the guard holds, until the drain begins.
    pub async fn keep(mut self, mut drain: Drain) {
        // It takes milliseconds for each pod, and nothing below needs to wait.
        let mut ending = pin!(self.end_older());
        let mut ended = false;
        let mut sweeps = interval(SWEEP);
        let mut checks = interval(UPLINK_CHECK);
        for ticks in [&mut sweeps, &mut checks] {
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
                    // Not before: the test's own connections would be ended too.
                    if ended {
                        self.try_route().await;
                    }
                }
                _ = checks.tick(), if self.uplink.is_some() => self.restore_uplinks().await,
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

    /// Ends the older connections, concurrently with the rest of the guard. If it fails, the agent does not become ready.
    fn end_older(&self) -> impl Future<Output = ()> + use<> {
        let (pods, hosts) = (self.cgroup.clone(), self.ends_hosts);
        let (metrics, ended) = (self.metrics.clone(), self.ended.clone());
        let asked = self.config != GuardConfig::default();
        async move {
            if asked {
                match blocking(move |token| sockets::destroy(token, &pods, hosts)).await {
                    Ok(destroyed) => destroyed.report(&metrics),
                    Err(error) => {
                        error!(%error, "Ending pods' older connections to the IMDS failed: pods may still use them");
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
                warn!(rules = rules.added, "Restored routing rules of the guard that were removed");
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
        // A panic was logged, and attached programs stay.
        let Ok((program, result)) = restored.await else { return };
        self.uplink = Some(program);
        match result {
            Ok(interfaces) if interfaces.is_empty() => {}
            Ok(interfaces) => {
                self.metrics.restored.inc_by(interfaces.len() as u64);
                warn!(?interfaces, "Restored the uplink guard, which was removed");
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
            info!(interfaces = ?new, "The uplink guard is on");
        }
        if count == 0 {
            warn!("The node has no route to the IMDS, so there is no uplink to guard yet");
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
            Reach::Open => "open: pods' packets bypass this node's routing and reach the IMDS",
            Reach::Holds | Reach::Unknown => reach.name(),
        });
        // Once open, it was open to pods that came before.
        if reach == Reach::Open {
            self.bypassed.send_replace(true);
        }
        let before = std::mem::replace(&mut self.reach, reach);
        match (before, reach) {
            (before, reach) if before == reach => {}
            (_, Reach::Open) => error!(
                "The route guard does not hold on this node: a packet from a pod's network bypassed the routing rules and reached the IMDS; add uplink to --guard, and set the instances' hop limit to 1"
            ),
            (Reach::Open, _) => warn!(state = reach.name(), "The route guard is no longer open"),
            (_, reach) => debug!(state = reach.name(), "The route guard was tested from a pod"),
        }
    }
}

/// Removes the guard's rules and filters from the node, of any preference, and returns their names.
///
/// # Errors
///
/// [`GuardError::Remove`].
pub(super) fn uninstall() -> Result<Vec<String>, GuardError> {
    let mut removed = Vec::new();
    for to in imds_addresses() {
        match route::remove_but(to, None) {
            Ok(rules) => removed.extend(rules),
            Err(error) if is_family_off(&error) => {}
            Err(source) => return Err(GuardError::Remove { to, source }),
        }
    }
    removed.extend(uplink::remove_filters());
    Ok(removed)
}

/// What to do with the agent's rules of another preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OtherRules {
    /// Remove them: they are of an earlier agent.
    Remove,
    /// Leave them: they may be of the other agent in a takeover. If both agents removed each other's rules at each change,
    /// there would be moments without any.
    Leave,
}

/// The changes that [`keep_rules`] made.
#[derive(Clone, Copy, Debug)]
struct RuleChanges {
    /// Missing rules that were added.
    added: usize,
    /// Rules of another preference that were removed.
    removed: usize,
    /// Whether the kernel has rules for IPv6.
    ipv6: bool,
}

/// Adds both families' rules, and then removes others. Without a preference, removes all.
fn keep_rules(preference: Option<u32>, others: OtherRules) -> Result<RuleChanges, GuardError> {
    let mut rules = RuleChanges { added: 0, removed: 0, ipv6: true };
    for to in imds_addresses() {
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

/// As [`keep_rules`], for the family of `to`. Returns the numbers of added and removed rules.
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

/// Runs `work`, which waits for the kernel, off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Blocking) -> T + Send + 'static,
) -> Result<T, GuardError> {
    blocking::spawn(work).await.map_err(|_| GuardError::Panicked)
}
