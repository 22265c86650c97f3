//! What agents do: ask when something is due, and plan by the answer.

use std::ops::Range;

use kiam_core::{
    credentials::{Pace, schedule},
    rate::Bucket,
};

use super::{Event, World, millis, random};
use crate::{
    account::Answer,
    tally::{Gap, Millis},
};

/// Calls of a node under way at once, as the prefetcher has it.
const IN_FLIGHT: u32 = 16;
/// How long STS takes to answer.
const LATENCY: Range<Millis> = 50..150;
/// The next restart comes within so long after the last: a new pod's start and the old one's end.
const RESTART: Millis = 30_000;

impl World {
    pub(super) fn restart_next(&mut self) {
        let node = self.next_restart;
        if node < self.fleet.nodes {
            self.next_restart += 1;
            self.at(self.now + random(RESTART), Event::Restart { node });
        }
    }

    pub(super) fn restart(&mut self, node: u32) {
        let Some(rolling) = self.plan.rolling else { return };
        let restarted = &mut self.nodes[node as usize];
        restarted.bucket = Bucket::default();
        restarted.pace = Pace::default();
        if rolling.warm {
            return self.restarted();
        }
        restarted.missing = self.fleet.sessions(&self.policy);
        let first = self.first(node);
        for session in first..first + self.fleet.sessions(&self.policy) {
            self.renew_identity(session);
        }
    }

    /// A restart is over; its place is another node's now.
    fn restarted(&mut self) {
        self.restarted_at = Some(self.now);
        self.restart_next();
    }

    pub(super) fn schedule(&mut self, session: u32, at: Millis) {
        let planned = &mut self.sessions[session as usize];
        planned.plan = planned.plan.wrapping_add(1);
        planned.due = at;
        let plan = planned.plan;
        self.at(at, Event::Due { session, plan });
    }

    pub(super) fn due(&mut self, session: u32, plan: u32) {
        let due = &mut self.sessions[session as usize];
        if due.plan != plan || due.pods == 0 || due.in_flight || due.queued {
            return;
        }
        due.queued = true;
        let node = self.node_of(session);
        self.nodes[node as usize].queue.push_back(session);
        self.ask(node);
    }

    /// Asks for what is queued, as far as the node may.
    pub(super) fn ask(&mut self, node: u32) {
        let now = self.instant();
        loop {
            let asking = &mut self.nodes[node as usize];
            if asking.queue.is_empty() || asking.in_flight >= IN_FLIGHT {
                return;
            }
            let wait = asking.bucket.wait(self.fleet.sts_rate, now).max(asking.pace.wait(now));
            if !wait.is_zero() {
                if !std::mem::replace(&mut asking.resuming, true) {
                    self.at(self.now + millis(wait) + 1, Event::Resume { node });
                }
                return;
            }
            let Some(session) = asking.queue.pop_front() else { return };
            self.sessions[session as usize].queued = false;
            if self.sessions[session as usize].pods > 0 {
                self.nodes[node as usize].bucket.take(self.fleet.sts_rate, now);
                self.nodes[node as usize].pace.take(now);
                self.call(node, session);
            }
        }
    }

    fn call(&mut self, node: u32, session: u32) {
        let answer = self.account.ask(self.instant());
        self.tally.called(self.now, answer);
        self.nodes[node as usize].in_flight += 1;
        let asked = &mut self.sessions[session as usize];
        asked.in_flight = true;
        let identity = asked.identity;
        let at = self.now + fastrand::u64(LATENCY);
        self.at(at, Event::Answered { session, identity, answer, asked: self.now });
    }

    pub(super) fn answered(
        &mut self,
        (session, identity): (u32, u32),
        answer: Answer,
        asked: Millis,
    ) {
        let node = self.node_of(session);
        let (rate, begun, now) = (self.fleet.sts_rate, self.instant_of(asked), self.instant());
        let asking = &mut self.nodes[node as usize];
        asking.in_flight -= 1;
        match answer {
            Answer::Throttled => asking.pace.throttled(rate, begun, now),
            Answer::Issued => asking.pace.answered(rate, now),
            Answer::Down => {}
        }
        if self.sessions[session as usize].identity == identity {
            self.settle(session, answer);
        }
        self.ask(node);
    }

    fn settle(&mut self, session: u32, answer: Answer) {
        let now = self.now;
        let settled = &mut self.sessions[session as usize];
        settled.in_flight = false;
        let wait = if let Some(class) = answer.error() {
            settled.failures += 1;
            schedule::jittered(schedule::backoff(class, settled.failures))
        } else {
            let lapsed = settled.expires > 0;
            if settled.expires > now {
                self.tally.renewed(settled.expires - now);
            } else {
                let from = settled.wanted_since.max(settled.expires);
                self.tally.gaps.push(Gap { from, until: now, lapsed });
            }
            settled.expires = now + millis(self.policy.duration);
            settled.failures = 0;
            let node = &mut self.nodes[(session / self.fleet.sessions(&self.policy)) as usize];
            if node.missing > 0 {
                node.missing -= 1;
                if node.missing == 0 {
                    self.restarted();
                }
            }
            self.policy.renewal()
        };
        self.schedule(session, now + millis(wait));
    }
}
