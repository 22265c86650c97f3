//! Pods come, go and want sessions.

use super::{Event, Session, World, millis, random};
use crate::{fleet::SessionName, tally::Millis};

/// How long the prefetcher keeps what nobody wants any more.
const LINGER: Millis = 60_000;

impl World {
    pub(super) fn want(&mut self, session: u32) {
        let now = self.now;
        let wanted = &mut self.sessions[session as usize];
        wanted.pods += 1;
        if wanted.pods > 1 {
            return;
        }
        wanted.wanted_since = now;
        if !wanted.in_flight && now - wanted.unwanted_since >= LINGER {
            *wanted = Session { expires: 0, failures: 0, due: now, ..wanted.clone() };
        }
        let due = wanted.due.max(now);
        if !wanted.in_flight {
            self.schedule(session, due);
        }
    }

    pub(super) fn replace(&mut self, pod: u32) {
        let (now, session) = (self.now, self.pods[pod as usize]);
        if self.policy.name == SessionName::Pod {
            return self.renew_identity(session);
        }
        let old = &mut self.sessions[session as usize];
        old.pods -= 1;
        if old.pods == 0 {
            old.unwanted_since = now;
        }
        let node = self.node_of(session);
        let choice = fastrand::u32(0..self.fleet.pods_sessions(self.policy.name));
        self.pods[pod as usize] = self.first(node) + choice;
        self.want(self.first(node) + choice);
    }

    /// Another session takes the place of this one, which nobody has asked for before.
    pub(super) fn renew_identity(&mut self, session: u32) {
        let now = self.now;
        let old = &mut self.sessions[session as usize];
        let (identity, plan) = (old.identity + 1, old.plan);
        let (queued, pods) = (old.queued, old.pods);
        *old = Session { identity, plan, queued, pods, wanted_since: now, ..Session::default() };
        self.schedule(session, now);
    }

    pub(super) fn plan_death(&mut self) {
        let Some(churn) = self.plan.churn else { return };
        let pods = f64::from(self.fleet.nodes * self.fleet.pods);
        let mean = churn.life.as_secs_f64() * 1000.0 / pods;
        let wait = -mean * (1.0 - fastrand::f64()).ln();
        // Rounded at random, as waits may be shorter than a millisecond.
        self.at(self.now + (wait + fastrand::f64()) as Millis, Event::Die);
    }

    pub(super) fn roll_out(&mut self) {
        let Some(churn) = self.plan.churn else { return };
        for pod in 0..self.fleet.nodes * self.fleet.pods {
            if fastrand::f64() < churn.rollout {
                let at = self.now + random(millis(churn.rollout_takes));
                self.at(at, Event::Replace { pod });
            }
        }
        self.at(self.now + 3_600_000, Event::Rollout);
    }
}
