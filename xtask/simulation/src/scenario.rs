//! What is simulated, and what is kept of it.

use std::{ops::Range, sync::Mutex, thread, time::Duration};

use kiam_core::rate::Rate;

use crate::{
    fleet::{Fleet, Policy, SessionName},
    plan::{Churn, Plan, Rolling, Start},
    tally::{Gap, Millis, Spread, quantile},
    world::{Outcome, millis, simulate},
};

pub(crate) const MINUTE: Duration = Duration::from_secs(60);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// What pods do on an ordinary day.
pub(crate) const CHURN: Churn = Churn {
    life: Duration::from_secs(8 * 3600),
    rollout: 0.1,
    rollout_takes: Duration::from_secs(600),
};

/// When STS goes down in the outages.
pub(crate) const OUTAGE_FROM: Duration = HOUR;
/// How long what comes after a restart or outage is followed, if sessions do not last longer.
const AFTERWARDS: Duration = Duration::from_secs(3 * 3600);

/// `--sts-rate=1:1`, the least there is.
const SLOW: Rate = Rate { burst: 1, period: Duration::from_secs(1) };

/// What happens to the fleet. Slow nodes ask STS as seldom as can be configured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scenario {
    /// Pods come and go; counted for so long, after an hour that is not.
    Day(Duration),
    /// All agents start at once, with pods that are there.
    MassRestart { slow: bool },
    /// All nodes boot.
    ColdStart,
    /// Nodes' agents restart by tenths of the fleet; warm ones are given what is held.
    Rolling { warm: bool, slow: bool },
    /// STS does not answer for so long.
    Outage(Duration),
}

/// One simulation, and what came of it.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) scenario: Scenario,
    pub(crate) policy: Policy,
    pub(crate) found: Found,
}

/// What is kept of an [`Outcome`].
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// All that was counted; of a restart or outage until all sessions are held, or half an hour if none was missing.
    pub(crate) calls: Spread,
    /// Of a restart or outage, what comes after that: whether what was fetched together is renewed together.
    pub(crate) echo: Spread,
    /// How long sessions that were not held were waited for; of an outage, from its end.
    pub(crate) waits: Waits,
    /// Sessions that expired.
    pub(crate) lapsed: usize,
    /// The least life that a renewed session had left.
    pub(crate) least_left: Option<Millis>,
    /// Not held when the simulation ended.
    pub(crate) bare: u32,
    pub(crate) restarted_at: Option<Millis>,
}

/// How long was waited.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waits {
    pub(crate) count: usize,
    pub(crate) p50: Millis,
    pub(crate) p99: Millis,
    pub(crate) max: Millis,
}

/// Simulates everything, on all processors.
pub(crate) fn run_all(fleet: Fleet, seed: u64) -> Vec<Run> {
    let all = all();
    let (next, done) = (Mutex::new(0), Mutex::new(Vec::new()));
    let worker = || {
        loop {
            let mut next = next.lock().expect("no worker panics with it");
            let index = *next;
            *next += 1;
            drop(next);
            let Some((scenario, policy)) = all.get(index).copied() else { return };
            let found = run(fleet, policy, scenario, seed);
            eprintln!("{scenario:?}, {policy:?}");
            let run = Run { scenario, policy, found };
            done.lock().expect("no worker panics with it").push((index, run));
        }
    };
    thread::scope(|scope| {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        (0..workers).for_each(|_| drop(scope.spawn(worker)));
    });
    let mut done = done.into_inner().expect("no worker panics with it");
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, run)| run).collect()
}

fn all() -> Vec<(Scenario, Policy)> {
    use SessionName::{Pod, Role, ServiceAccount};
    let mut all = Vec::new();
    for name in [Role, ServiceAccount, Pod] {
        // Sessions of a quarter of an hour make most calls, and every hour of theirs is like the one before.
        all.push((Scenario::Day(HOUR), Policy::new(name, 15 * MINUTE)));
        let longer = [HOUR, 12 * HOUR].map(|duration| Policy::new(name, duration));
        all.extend(longer.map(|policy| (Scenario::Day(24 * HOUR), policy)));
    }
    let chained = Policy { chained: true, ..Policy::new(Role, HOUR) };
    all.push((Scenario::Day(24 * HOUR), chained));
    let policies = [(Role, HOUR), (Pod, HOUR), (Role, 12 * HOUR), (Pod, 12 * HOUR)];
    let policies = policies.map(|(name, duration)| Policy::new(name, duration));
    for policy in policies {
        all.extend(
            [Scenario::MassRestart { slow: false }, Scenario::ColdStart].map(|it| (it, policy)),
        );
        let rolling = [false, true].map(|warm| Scenario::Rolling { warm, slow: false });
        all.extend(rolling.map(|it| (it, policy)));
    }
    let slow =
        [Scenario::MassRestart { slow: true }, Scenario::Rolling { warm: false, slow: true }];
    all.extend(slow.map(|it| (it, Policy::new(Pod, HOUR))));
    for policy in policies {
        all.extend([15 * MINUTE, HOUR, 3 * HOUR].map(|it| (Scenario::Outage(it), policy)));
    }
    all
}

/// Simulates one.
pub(crate) fn run(fleet: Fleet, policy: Policy, scenario: Scenario, seed: u64) -> Found {
    let fleet = if scenario.is_slow() { Fleet { sts_rate: SLOW, ..fleet } } else { fleet };
    let plan = scenario.plan(&fleet, &policy);
    let until = millis(plan.until);
    let outage = plan.outage.clone();
    let outcome = simulate(fleet, policy, plan, seed);
    match scenario {
        Scenario::Day(_) => Found::of(&outcome, millis(HOUR)..until, until..until, millis(HOUR)),
        Scenario::Outage(_) => Found::of_recovery(&outcome, millis(outage.end), until),
        Scenario::MassRestart { .. } | Scenario::ColdStart | Scenario::Rolling { .. } => {
            Found::of_recovery(&outcome, 0, until)
        }
    }
}

// === impl Scenario ===

impl Scenario {
    pub(crate) fn is_slow(self) -> bool {
        matches!(self, Self::MassRestart { slow: true } | Self::Rolling { slow: true, .. })
    }

    fn plan(self, fleet: &Fleet, policy: &Policy) -> Plan {
        // Until what was fetched has been renewed.
        let afterwards = AFTERWARDS.max(policy.duration * 3 / 4);
        let quiet = Plan {
            start: Start::Steady,
            churn: None,
            rolling: None,
            outage: Duration::ZERO..Duration::ZERO,
            until: afterwards,
        };
        match self {
            Self::Day(counted) => Plan { churn: Some(CHURN), until: HOUR + counted, ..quiet },
            Self::MassRestart { .. } => {
                Plan { start: Start::Cold(Duration::from_secs(1), Duration::ZERO), ..quiet }
            }
            Self::ColdStart => Plan { start: Start::Cold(2 * MINUTE, MINUTE), ..quiet },
            Self::Rolling { warm, .. } => {
                let surge = (fleet.nodes / 10).max(1);
                Plan { rolling: Some(Rolling { surge, warm }), ..quiet }
            }
            Self::Outage(lasts) => {
                let outage = OUTAGE_FROM..OUTAGE_FROM + lasts;
                Plan { until: outage.end + afterwards, outage, ..quiet }
            }
        }
    }
}

// === impl Found ===

impl Found {
    /// Of what was counted, what came after that, and gaps that ended later than `from`; they count from there on.
    fn of(outcome: &Outcome, counted: Range<Millis>, after: Range<Millis>, from: Millis) -> Self {
        let tally = &outcome.tally;
        let gaps: Vec<Gap> = tally.gaps.iter().filter(|gap| gap.until > from).copied().collect();
        Self {
            calls: tally.spread(counted),
            echo: tally.spread(after),
            waits: Waits::of(gaps.iter().map(|gap| gap.until - gap.from.max(from)).collect()),
            lapsed: gaps.iter().filter(|gap| gap.lapsed).count(),
            least_left: tally.least_left,
            bare: outcome.bare,
            restarted_at: outcome.restarted_at,
        }
    }

    /// Counts from `from` until all is held. In whole minutes, so that a worst minute is one.
    fn of_recovery(outcome: &Outcome, from: Millis, until: Millis) -> Self {
        let last = outcome.tally.gaps.iter().map(|gap| gap.until).filter(|at| *at > from).max();
        let end = last.map_or(from + millis(30 * MINUTE), |at| at.next_multiple_of(millis(MINUTE)));
        Self::of(outcome, from..end.min(until), end.min(until)..until, from)
    }
}

// === impl Waits ===

impl Waits {
    fn of(mut waits: Vec<Millis>) -> Self {
        waits.sort_unstable();
        let at = |share| quantile(&waits, share).unwrap_or(0);
        Self { count: waits.len(), p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}
