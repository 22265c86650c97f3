//! Attaching the programs again while the agent runs.

use super::{Cgroup, Error, Interception, ancestors, programs::GUARD};

impl Interception {
    /// Whether the pods' cgroup is still the one that the programs are attached to.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.cgroup.is_there()
    }

    /// Whether the QoS classes' cgroups that are there are those that the programs know.
    #[must_use]
    pub fn knows_classes(&self) -> bool {
        self.cgroup.qos_classes() == self.classes
    }

    /// Tells the programs of the QoS classes' cgroups that have come. Until then a class is one pod to the quota.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn follow_classes(&mut self) -> Result<(), Error> {
        self.mark_cgroups()
    }

    /// Attaches the programs to the pods' cgroup that has come in the place of the one that is gone, which
    /// is returned. New links are renamed over the old ones' pins.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] or [`Error::NoCgroup`] while there is none; the kernel's.
    pub fn follow(&mut self) -> Result<Cgroup, Error> {
        let gone = std::mem::replace(&mut self.cgroup, Cgroup::open(self.given.as_deref())?);
        match self.attach_all() {
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

    /// Puts these programs back where another agent put its own and did not come to serve.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn reassert(&mut self) -> Result<(), Error> {
        self.attach_all()
    }
}
