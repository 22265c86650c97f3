//! Restores the programs while the agent runs.

use std::path::{Path, PathBuf};

use kiam_common::names::program;

use super::{ancestors, own_pod::CLASSES_TIME};
use crate::{
    error::Error,
    intercept::{Drift, Interception},
    pins::{self, AttachLock},
    sys::{Cgroup, Walk},
};
use kiam_core::blocking::Blocking;

/// The result of [`Interception::restore`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestoreOutcome {
    /// This drift was repaired; empty if it was gone already.
    Done(Drift),
    /// Another agent is attaching its programs.
    Busy,
    /// This drift is left to another agent that has the attach lock, for two seconds at most, since it may hang.
    Left(Drift),
    /// Another agent has attached its programs.
    Replaced,
}

impl Interception {
    /// Whether the pods' cgroup is still the one that the programs are attached to.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.cgroup.is_there()
    }

    /// Other pods' cgroups that are in use beside the attached one; none if `--cgroup` is set.
    #[must_use]
    pub fn other_roots(&self, blocking: &Blocking) -> Vec<PathBuf> {
        let searched = self.given.is_none().then(|| Walk::new(blocking, CLASSES_TIME));
        searched.map_or_else(Vec::new, |mut walk| self.cgroup.others(&mut walk))
    }

    /// Whether the programs know the current cgroups of QoS classes.
    #[must_use]
    pub fn knows_classes(&self, blocking: &Blocking) -> bool {
        self.cgroup.qos_classes(&mut Walk::new(blocking, CLASSES_TIME)) == self.classes
    }

    /// Marks new cgroups of QoS classes. Until then the quota counts a class as one pod.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn follow_classes(&mut self, blocking: &Blocking) -> Result<(), Error> {
        self.mark_cgroups(blocking)
    }

    /// Attaches the programs to the pods' cgroup that replaced the old one, and returns it. New links are renamed over the
    /// old ones' pins.
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
                // The old cgroup stays recorded, so that this is retried.
                self.cgroup = gone;
                Err(error)
            }
        }
    }

    /// Attaches the packet guard once there are other programs above the pods' cgroup. Returns whether that was now.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn follow_ancestors(&mut self) -> Result<bool, Error> {
        let begins = self.enforces()
            && !self.guards_packets()
            && !ancestors::with_programs(&self.cgroup)?.is_empty();
        if begins {
            self.attach_one(program::GUARD)?;
            self.programs.push(program::GUARD);
        }
        Ok(begins)
    }

    /// The differences from the state that this agent set up. The pods' cgroup must be the attached one.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn drift(&mut self) -> Result<Drift, Error> {
        let drift = self.open_pins.drift(&self.programs, self.cgroup.id(), &self.pins)?;
        if drift.is_empty() || !drift.replaced.is_empty() {
            self.patience.renew();
        }
        Ok(drift)
    }

    /// Restores detached programs and removed pins. Changes nothing where another agent's programs have replaced these, since
    /// that agent is responsible, nor for a while after another agent has taken the attach lock.
    ///
    /// # Errors
    ///
    /// The kernel's. A retry completes the rest.
    pub fn restore(&mut self) -> Result<RestoreOutcome, Error> {
        let turn = match AttachLock::take(self.bpffs()) {
            Ok(turn) => turn,
            Err(Error::NewerLayout { .. }) => return Ok(RestoreOutcome::Replaced),
            Err(error) => return Err(error),
        };
        // Again, now that the attach lock keeps other agents from changes.
        let drift = self.drift()?;
        match (&turn, drift.replaced.is_empty()) {
            _ if drift.is_empty() => return Ok(RestoreOutcome::Done(drift)),
            (Some(_), false) => return Ok(RestoreOutcome::Replaced),
            (None, false) => return Ok(RestoreOutcome::Busy),
            (Some(_), true) => self.patience.renew(),
            (None, true) if !self.patience.is_over() => return Ok(RestoreOutcome::Left(drift)),
            // If the other agent attaches at this moment too, the last pinned links stay.
            (None, true) => {}
        }
        for name in &drift.detached {
            self.attach_one(name)?;
        }
        for name in &drift.unpinned {
            self.open_pins.pin(name, &self.pins)?;
        }
        self.note_links();
        Ok(RestoreOutcome::Done(drift))
    }

    /// Restores these programs after another agent replaced them and failed to serve.
    ///
    /// # Errors
    ///
    /// The kernel's; [`Error::NewerLayout`] where the other agent was of a newer release.
    pub fn reassert(&mut self, blocking: &Blocking) -> Result<(), Error> {
        pins::open(self.bpffs())?;
        // An attached link without a pin would otherwise get a second one beside it.
        for name in self.drift()?.unpinned {
            self.open_pins.pin(name, &self.pins)?;
        }
        self.attach_all(blocking)
    }

    fn bpffs(&self) -> &Path {
        self.pins.parent().unwrap_or(&self.pins)
    }
}
