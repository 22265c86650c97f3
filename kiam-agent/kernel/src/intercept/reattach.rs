//! Attaching the programs again while the agent runs.

use std::path::{Path, PathBuf};

use super::{ancestors, loading::GUARD, own_pod::CLASSES_TIME};
use crate::{
    error::Error,
    intercept::{Interception, Losses},
    pins::{self, AttachLock},
    sys::{Cgroup, Walk},
};
use kiam_core::blocking::Blocking;

/// What came of [`Interception::restore`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restored {
    /// This was lost and is restored; nothing, if it came back by itself.
    Done(Losses),
    /// Another agent attaches its programs just now.
    Busy,
    /// This is left to another agent, which has the attach lock, for two seconds at most: that agent may hang.
    Left(Losses),
    /// Another agent has attached its programs.
    Replaced,
}

impl Interception {
    /// Whether the pods' cgroup is still the one that the programs are attached to.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.cgroup.is_there()
    }

    /// Pods' cgroups that are in use beside the one that the programs are attached to; none where `--cgroup` names that.
    #[must_use]
    pub fn other_roots(&self, blocking: &Blocking) -> Vec<PathBuf> {
        let searched = self.given.is_none().then(|| Walk::new(blocking, CLASSES_TIME));
        searched.map_or_else(Vec::new, |mut walk| self.cgroup.others(&mut walk))
    }

    /// Whether the QoS classes' cgroups that are there are those that the programs know.
    #[must_use]
    pub fn knows_classes(&self, blocking: &Blocking) -> bool {
        self.cgroup.qos_classes(&mut Walk::new(blocking, CLASSES_TIME)) == self.classes
    }

    /// Tells the programs of the QoS classes' cgroups that have come. Until then a class is one pod to the quota.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn follow_classes(&mut self, blocking: &Blocking) -> Result<(), Error> {
        self.mark_cgroups(blocking)
    }

    /// Attaches the programs to the pods' cgroup that has come in the place of the one that is gone, which
    /// is returned. New links are renamed over the old ones' pins.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] or [`Error::NoCgroup`] while there is none; the kernel's.
    pub fn follow(&mut self, blocking: &Blocking) -> Result<Cgroup, Error> {
        let new = Cgroup::open(blocking, self.given.as_deref())?;
        let gone = std::mem::replace(&mut self.cgroup, new);
        match self.attach_all(blocking) {
            Ok(()) => Ok(self.cgroup.clone()),
            Err(error) => {
                // Not in place yet: it is tried again.
                self.cgroup = gone;
                Err(error)
            }
        }
    }

    /// Guards packets as well, once others have put programs above the pods' cgroup; whether that begins now.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn follow_ancestors(&mut self) -> Result<bool, Error> {
        let begins = self.enforces()
            && !self.guards_packets()
            && !ancestors::with_programs(&self.cgroup)?.is_empty();
        if begins {
            self.attach_one(GUARD)?;
            self.programs.push(GUARD);
        }
        Ok(begins)
    }

    /// What is not as this agent left it. The pods' cgroup is in its place.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn losses(&mut self) -> Result<Losses, Error> {
        let losses = self.hold.losses(&self.programs, self.cgroup.id(), &self.pins)?;
        if losses.is_empty() || !losses.replaced.is_empty() {
            self.patience.renew();
        }
        Ok(losses)
    }

    /// Restores detached programs and removed pins. Where another agent's programs are in the place of these, nothing is
    /// changed; nor while another agent has the attach lock, if that is not for long.
    ///
    /// # Errors
    ///
    /// The kernel's; what is restored stays so, and a later attempt completes it.
    pub fn restore(&mut self) -> Result<Restored, Error> {
        let lock = match AttachLock::take(self.bpffs()) {
            Ok(lock) => lock,
            Err(Error::NewerLayout { .. }) => return Ok(Restored::Replaced),
            Err(error) => return Err(error),
        };
        // Once more: under the lock no other agent changes anything.
        let losses = self.losses()?;
        match (&lock, losses.replaced.is_empty()) {
            _ if losses.is_empty() => return Ok(Restored::Done(losses)),
            (Some(_), false) => return Ok(Restored::Replaced),
            (None, false) => return Ok(Restored::Busy),
            (Some(_), true) => self.patience.renew(),
            (None, true) if !self.patience.is_over() => return Ok(Restored::Left(losses)),
            // Should the other agent attach at this moment as well, the links that are pinned last are those that stay.
            (None, true) => {}
        }
        for name in &losses.detached {
            self.attach_one(name)?;
        }
        for name in &losses.unpinned {
            self.hold.pin(name, &self.pins)?;
        }
        self.note_links();
        Ok(Restored::Done(losses))
    }

    /// Attaches these programs again where another agent attached its own and did not come to serve.
    ///
    /// # Errors
    ///
    /// The kernel's; [`Error::NewerLayout`] where the other agent was of a newer release.
    pub fn reassert(&mut self, blocking: &Blocking) -> Result<(), Error> {
        pins::open(self.bpffs())?;
        // Unpinned, a link that works would get a second one beside it.
        for name in self.losses()?.unpinned {
            self.hold.pin(name, &self.pins)?;
        }
        self.attach_all(blocking)
    }

    fn bpffs(&self) -> &Path {
        self.pins.parent().unwrap_or(&self.pins)
    }
}
