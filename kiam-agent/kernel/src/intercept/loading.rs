//! Loads every program that the agent may ever attach before it attaches the first.
//!
//! So a program that the kernel rejects leaves the node as it was: an earlier agent's programs stay attached, and in a
//! first rollout pods keep the IMDS, while the agent reports why it can't start.

use std::path::{Path, PathBuf};

use aya::{Ebpf, EbpfError, EbpfLoader, maps::MapError, programs::SocketFilter};
use kiam_common::{
    HOST_NETNS_INITIAL,
    names::{constant, map, program},
    redirect::{AgentPorts, Target},
};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{ancestors, attach, loader, namespace, open_pins::OpenPins};
use crate::{
    error::Error,
    guard::UplinkProgram,
    intercept::{Config, HostNetworkPods, Interception, Mode, Rewriter},
    pins::{self, locks::Patience},
    sys::{Cgroup, features, netns, rejection::program_error},
};
use kiam_core::blocking::Blocking;

pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("KIAM_BPF_OBJECT"));

/// The enforcing programs in the order in which they are attached. First no pod can take the agent's ports. Identity comes
/// before the redirect, so that no redirected connection lacks a record.
pub(super) const ENFORCING: [&str; 9] = [
    program::BIND4,
    program::BIND6,
    program::SOCK_OPS,
    program::GETPEERNAME4,
    program::GETPEERNAME6,
    program::CONNECT6,
    program::CONNECT4,
    program::SENDMSG4,
    program::SENDMSG6,
];

/// The observing programs, which see connects and datagrams and change nothing. `kiam_sock_ops` publishes nothing here, but
/// removes earlier entries: a connection whose close is not seen would count for its pod for ever.
pub(super) const OBSERVING: [&str; 5] =
    [program::SOCK_OPS, program::CONNECT6, program::CONNECT4, program::SENDMSG4, program::SENDMSG6];

/// The object with all programs that the kernel has verified.
struct VerifiedObject {
    ebpf: Ebpf,
    programs: Vec<&'static str>,
    rewriter: Rewriter,
    uplink: Option<UplinkProgram>,
}

/// The constants in the programs that depend on the node and the configuration.
#[derive(Clone, Copy)]
struct Constants<'a> {
    config: &'a Config,
    target: Target,
    /// As `HOST_NETNS` has it.
    host_netns: u64,
    /// Whether the kernel tells network namespaces apart (5.14).
    told: bool,
}

/// Has the kernel verify every program that `config` may attach, over maps that nothing pins, and returns their number.
/// Nothing of it stays.
pub(crate) fn verify_all(config: &Config, target: Target) -> Result<usize, Error> {
    check_object()?;
    // Other failures of this question are reported elsewhere.
    let told = netns::host_netns().unwrap_or_default();
    let host_netns = told.unwrap_or(HOST_NETNS_INITIAL);
    let constants = Constants { config, target, host_netns, told: told.is_some() };
    let enforces = config.mode == Mode::Enforce;
    let programs = if enforces { ENFORCING.to_vec() } else { OBSERVING.to_vec() };
    let verified = VerifiedObject::load(OBJECT, constants, programs, None)?;
    // With the self-test's rewriter, the packets' guard, and the filter of SYNs.
    let further = [true, enforces, config.has_filter(), verified.uplink.is_some()];
    Ok(verified.programs.len() + further.into_iter().filter(|loaded| *loaded).count())
}

/// Ends the start of an agent that was built without the kernel object.
pub(super) fn check_object() -> Result<(), Error> {
    if OBJECT.is_empty() { Err(Error::NoObject) } else { Ok(()) }
}

// === impl Interception ===

impl Interception {
    /// Loads the programs, with `target` as the agent's listeners, over the pinned maps or new ones. Attached programs do not
    /// change.
    ///
    /// # Errors
    ///
    /// Whatever is missing on this machine; see [`Error`].
    pub fn load(blocking: &Blocking, config: &Config, target: Target) -> Result<Self, Error> {
        Self::load_object(OBJECT, blocking, config, target)
    }

    fn load_object(
        object: &[u8],
        blocking: &Blocking,
        config: &Config,
        target: Target,
    ) -> Result<Self, Error> {
        let cgroup = Cgroup::open(blocking, config.cgroup.as_deref())?;
        let (pins, older) = pins::open(&config.bpffs)?;
        let told = netns::host_netns().map_err(|source| Error::File {
            what: "the node's network namespace cookie (SO_NETNS_COOKIE)",
            path: PathBuf::from("/proc/self/ns/net"),
            source,
        })?;
        let first = pins::is_empty(&pins)?;
        let host_netns = told.unwrap_or_else(|| namespace::learned(object, &cgroup));
        let constants = Constants { config, target, host_netns, told: told.is_some() };
        let programs = programs(config, &cgroup)?;
        let verified =
            VerifiedObject::load(object, constants, programs, Some(&pins)).inspect_err(|_| {
                // The new pinned maps are unused.
                if first && let Err(error) = pins::remove_maps(&pins) {
                    warn!(%error, "Removing the unused maps of programs that can't be loaded failed");
                }
            })?;
        Ok(Self {
            ebpf: verified.ebpf,
            pins,
            older,
            cgroup,
            given: config.cgroup.clone(),
            programs: verified.programs,
            classes: Vec::new(),
            open_pins: OpenPins::default(),
            patience: Patience::default(),
            guards_uplinks: verified.uplink.is_some(),
            uplink: verified.uplink,
            rewriter: verified.rewriter,
            filters_syns: config.has_filter(),
            host_netns: told,
            log: config.log,
            boot_notes: config.boot_notes.clone(),
            intercepted: watch::Sender::default(),
        })
    }
}

// === impl VerifiedObject ===

impl VerifiedObject {
    /// Without `pins` the maps are new, and nothing is pinned.
    fn load(
        object: &[u8],
        constants: Constants<'_>,
        programs: Vec<&'static str>,
        pins: Option<&Path>,
    ) -> Result<Self, Error> {
        let config = constants.config;
        let mut ebpf = constants.load(object, pins)?;
        for &name in &programs {
            verify(&mut ebpf, name)?;
        }
        if config.mode == Mode::Enforce {
            // Programs that make it necessary may be attached above the pods' cgroup at any time.
            verify(&mut ebpf, program::GUARD)?;
        }
        if config.has_filter() {
            listener_filter(&mut ebpf)?.load().map_err(program_error(program::LISTENER))?;
        }
        let rewriter = Rewriter::load(&mut ebpf)?;
        let uplink = match config.guard.uplink && config.mode == Mode::Enforce {
            true => {
                let agent = id(&ebpf, program::CONNECT4)?;
                let ebpf = loader(pins).load(object).map_err(rejected)?;
                // What nothing is pinned for is never attached.
                let pins = pins.unwrap_or(&config.bpffs).to_owned();
                Some(UplinkProgram::load(ebpf, pins, agent)?)
            }
            false => None,
        };
        Ok(Self { ebpf, programs, rewriter, uplink })
    }
}

// === impl Constants ===

impl Constants<'_> {
    /// Opens the object with these constants and with maps pinned in `pins`, if given. No program is loaded yet.
    fn load(self, object: &[u8], pins: Option<&Path>) -> Result<Ebpf, Error> {
        let Self { config, target, host_netns, told } = self;
        let passes = u32::from(config.host_network == HostNetworkPods::Pass);
        let observes = u32::from(config.mode == Mode::Observe);
        let path = config.path as u32;
        let [admin, metrics] = config.operator_ports;
        let ports: AgentPorts = [target.v4_port, target.v6_port, admin, metrics];
        let only_known = u32::from(config.has_filter() && told);
        let level: u8 = if config.log { 4 } else { 0 };
        let mut loader = loader(pins);
        loader
            .override_global(constant::TARGET, &target, true)
            .override_global(constant::AGENT_PORTS, &ports, true)
            .override_global(constant::HOST_NETNS, &host_netns, true)
            .override_global(constant::HOST_NETWORK_PASSES, &passes, true)
            .override_global(constant::NAMESPACES_ARE_KNOWN, &only_known, true)
            .override_global(constant::OBSERVES, &observes, true)
            .override_global(constant::PATH, &path, true)
            .override_global(aya_log::LEVEL, &level, false);
        loader.load(object).map_err(rejected)
    }
}

/// The error of an object that can't be loaded, for example because the kernel rejects a map.
pub(super) fn rejected(error: EbpfError) -> Error {
    match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            features::rejected_map(name, io_error)
        }
        error => Error::Load(error),
    }
}

/// A loader that uses the maps pinned in `pins`, or pins new ones. Without `pins` it pins none.
fn loader(pins: Option<&Path>) -> EbpfLoader<'static> {
    let mut loader = loader::new();
    if let Some(pins) = pins {
        for map in map::PINNED {
            loader.map_pin_path(map, pins.join(map));
        }
    }
    loader
}

/// The programs for `config`, in the order in which they are attached.
fn programs(config: &Config, cgroup: &Cgroup) -> Result<Vec<&'static str>, Error> {
    if config.mode == Mode::Observe {
        return Ok(OBSERVING.to_vec());
    }
    let mut programs = ENFORCING.to_vec();
    let above = ancestors::with_programs(cgroup)?;
    for path in &above {
        // They run after the agent's and may rewrite any address to the IMDS's, as socket load balancers do.
        info!(cgroup = %path.display(), "Other programs are attached above the pods' cgroup, so packets are guarded too");
    }
    if config.guard.skb || !above.is_empty() {
        programs.push(program::GUARD);
    }
    Ok(programs)
}

/// Loads a program for a cgroup. The verifier takes long, and while only some programs are replaced, those of two agents
/// run together.
fn verify(ebpf: &mut Ebpf, name: &'static str) -> Result<(), Error> {
    let program = ebpf.program_mut(name).ok_or(Error::Missing(name))?;
    attach::load(program).map(drop).map_err(program_error(name))
}

/// The filter of SYNs at the agent's listeners.
pub(super) fn listener_filter(ebpf: &mut Ebpf) -> Result<&mut SocketFilter, Error> {
    let program = ebpf.program_mut(program::LISTENER).ok_or(Error::Missing(program::LISTENER))?;
    program.try_into().map_err(program_error(program::LISTENER))
}

/// The kernel's id of a loaded program.
fn id(ebpf: &Ebpf, name: &'static str) -> Result<u32, Error> {
    let program = ebpf.program(name).ok_or(Error::Missing(name))?;
    program.info().map(|info| info.id()).map_err(program_error(name))
}

#[cfg(test)]
mod tests;
