//! The agent's open links and maps: while the agent lives, removing a pin detaches nothing.

use std::path::{Path, PathBuf};

use aya::maps::MapData;
use kiam_common::names::map::PINNED;

use super::programs::map_error;
use crate::{error::Error, pins, sys::links::PinnedLink};

/// The open links and maps of one agent.
#[derive(Debug, Default)]
pub(super) struct OpenPins {
    links: Vec<OpenLink>,
    maps: Vec<(&'static str, MapData)>,
}

#[derive(Debug)]
struct OpenLink {
    /// The program's name, and its id in the kernel.
    name: &'static str,
    program: u32,
    link: PinnedLink,
}

/// The differences from the state that this agent set up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// Programs that are no longer attached.
    pub detached: Vec<&'static str>,
    /// Links, by program name, and maps whose pins are gone.
    pub unpinned: Vec<&'static str>,
    /// Programs whose links or pins another agent has replaced.
    pub replaced: Vec<&'static str>,
}

/// A link of a program, to be compared.
#[derive(Debug)]
pub(super) struct AttachedLink {
    program: u32,
    link: PinnedLink,
    pin: PathBuf,
}

// === impl AttachedLink ===

impl AttachedLink {
    /// Whether the link still has the program, and is attached to `cgroup`.
    pub(super) fn is_at(&self, cgroup: u64) -> bool {
        self.link.attached(&self.pin).ok() == Some((self.program, cgroup))
    }
}

// === impl Drift ===

impl Drift {
    /// Whether there are no differences.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

// === impl OpenLink ===

impl OpenLink {
    /// Adds this link's differences from `cgroup` and `pin` to `drift`.
    fn drift(&self, cgroup: u64, pin: &Path, drift: &mut Drift) -> Result<(), Error> {
        let (program, at) = self.link.attached(pin)?;
        let (mut pinned, mut works) = (false, at == cgroup);
        if let Some(there) = PinnedLink::open(pin)? {
            pinned = there.id(pin)? == self.link.id(pin)?;
            if !pinned && there.cgroup(pin)? == cgroup {
                drift.replaced.push(self.name);
                return Ok(());
            }
            // The pin is of a link that is attached nowhere. Only a new link of this agent can be renamed over it.
            works &= pinned;
        }
        match works {
            false => drift.detached.push(self.name),
            true if program != self.program => drift.replaced.push(self.name),
            true => {}
        }
        if works && !pinned {
            drift.unpinned.push(self.name);
        }
        Ok(())
    }
}

// === impl OpenPins ===

impl OpenPins {
    /// Opens the link at `pin`, of the program `name` with the id `program`.
    pub(super) fn link(
        &mut self,
        name: &'static str,
        program: u32,
        pin: &Path,
    ) -> Result<(), Error> {
        self.links.retain(|held| held.name != name);
        // A missing pin is found as drift later.
        if let Some(link) = PinnedLink::open(pin)? {
            self.links.push(OpenLink { name, program, link });
        }
        Ok(())
    }

    /// Opens the maps in `pins`.
    pub(super) fn maps(&mut self, pins: &Path) -> Result<(), Error> {
        let open = |name| Ok((name, MapData::from_pin(pins.join(name)).map_err(map_error(name))?));
        self.maps = PINNED.into_iter().map(open).collect::<Result<_, Error>>()?;
        Ok(())
    }

    /// The open links of `programs`, whose pins are in `pins`.
    pub(super) fn attached(
        &self,
        programs: &[&'static str],
        pins: &Path,
    ) -> Result<Vec<AttachedLink>, Error> {
        let open = self.links.iter().filter(|held| programs.contains(&held.name));
        let attached = open.map(|held| {
            let pin = pins::link(pins, held.name);
            Ok(AttachedLink { program: held.program, link: held.link.try_clone(&pin)?, pin })
        });
        attached.collect()
    }

    /// The differences of `programs`, which were attached to `cgroup`, and of the maps from the pins in `pins`.
    pub(super) fn drift(
        &self,
        programs: &[&'static str],
        cgroup: u64,
        pins: &Path,
    ) -> Result<Drift, Error> {
        let mut drift = Drift::default();
        for &name in programs {
            let pin = pins::link(pins, name);
            match self.links.iter().find(|held| held.name == name) {
                None => drift.detached.push(name),
                Some(held) => held.drift(cgroup, &pin, &mut drift)?,
            }
        }
        let maps = self.maps.iter().map(|(name, _)| *name);
        drift.unpinned.extend(maps.filter(|name| !pins.join(name).exists()));
        Ok(drift)
    }

    /// Pins the link or the map `name` again.
    pub(super) fn pin(&self, name: &str, pins: &Path) -> Result<(), Error> {
        if let Some(held) = self.links.iter().find(|held| held.name == name) {
            return held.link.pin(&pins::link(pins, name));
        }
        let pinned = |path: PathBuf, map: &MapData| {
            map.pin(&path).map_err(|source| Error::Pin { path, source })
        };
        let map = self.maps.iter().find(|(held, _)| *held == name);
        map.map_or(Ok(()), |(_, map)| pinned(pins.join(name), map))
    }
}
