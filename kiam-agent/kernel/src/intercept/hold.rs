//! What this agent has attached and pinned, held open: while it lives, a pin that somebody removes detaches nothing.

use std::path::{Path, PathBuf};

use aya::maps::MapData;

use super::{loading::MAPS, programs::map_error};
use crate::{error::Error, pins, sys::links::PinnedLink};

/// The links and maps of one agent.
#[derive(Debug, Default)]
pub(super) struct Hold {
    links: Vec<HeldLink>,
    maps: Vec<(&'static str, MapData)>,
}

#[derive(Debug)]
struct HeldLink {
    /// The program's name, and its id in the kernel.
    name: &'static str,
    program: u32,
    link: PinnedLink,
}

/// The programs and pins that are not as this agent left them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Programs that are attached no longer.
    pub detached: Vec<&'static str>,
    /// Links, by their programs, and maps whose pins are gone.
    pub unpinned: Vec<&'static str>,
    /// Programs in whose links, or in the place of whose pins, others are.
    pub replaced: Vec<&'static str>,
}

// === impl Losses ===

impl Losses {
    /// Whether nothing is lost.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

// === impl HeldLink ===

impl HeldLink {
    /// Adds what is not as it was left at `cgroup` and at `pin`.
    fn losses(&self, cgroup: u64, pin: &Path, losses: &mut Losses) -> Result<(), Error> {
        let (program, at) = self.link.attached(pin)?;
        let (mut pinned, mut works) = (false, at == cgroup);
        if let Some(there) = PinnedLink::open(pin)? {
            pinned = there.id(pin)? == self.link.id(pin)?;
            if !pinned && there.cgroup(pin)? == cgroup {
                losses.replaced.push(self.name);
                return Ok(());
            }
            // A link that works nowhere is in the pin's place: only a new one of ours can be renamed over it.
            works &= pinned;
        }
        match works {
            false => losses.detached.push(self.name),
            true if program != self.program => losses.replaced.push(self.name),
            true => {}
        }
        if works && !pinned {
            losses.unpinned.push(self.name);
        }
        Ok(())
    }
}

// === impl Hold ===

impl Hold {
    /// Holds the link that is pinned at `pin` with the program `name`, whose id is `program`.
    pub(super) fn link(
        &mut self,
        name: &'static str,
        program: u32,
        pin: &Path,
    ) -> Result<(), Error> {
        self.links.retain(|held| held.name != name);
        // `None`: somebody was faster, which is seen as any other loss.
        if let Some(link) = PinnedLink::open(pin)? {
            self.links.push(HeldLink { name, program, link });
        }
        Ok(())
    }

    /// Holds the maps that are pinned in `pins`.
    pub(super) fn maps(&mut self, pins: &Path) -> Result<(), Error> {
        let open = |name| Ok((name, MapData::from_pin(pins.join(name)).map_err(map_error(name))?));
        self.maps = MAPS.into_iter().map(open).collect::<Result<_, Error>>()?;
        Ok(())
    }

    /// What of `programs`, which were attached to `cgroup`, and of the maps is not as it was left in `pins`.
    pub(super) fn losses(
        &self,
        programs: &[&'static str],
        cgroup: u64,
        pins: &Path,
    ) -> Result<Losses, Error> {
        let mut losses = Losses::default();
        for &name in programs {
            let pin = pins::link(pins, name);
            match self.links.iter().find(|held| held.name == name) {
                None => losses.detached.push(name),
                Some(held) => held.losses(cgroup, &pin, &mut losses)?,
            }
        }
        let maps = self.maps.iter().map(|(name, _)| *name);
        losses.unpinned.extend(maps.filter(|name| !pins.join(name).exists()));
        Ok(losses)
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
