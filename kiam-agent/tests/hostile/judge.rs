//! What a victim noticed, what the attack cost the agent, and what is to be thought of it.

use std::{collections::BTreeMap, fmt, time::Duration};

use lab::{Lab, pod_client::victim::VictimReport, role_arn};

/// The victim's p99 may be so many times that of its control, and up to the floor in any case: what a scheduler does.
const SLOWER: u32 = 5;
const FLOOR: Duration = Duration::from_millis(75);
/// What no victim's p99 may exceed.
const SLOWEST: Duration = Duration::from_millis(250);
/// An agent is ready within this time, or within so many times what it takes in the control.
const READY: Duration = Duration::from_secs(8);
/// The agent's peak in MiB. The manifest's limit is 256, which the kernel's buffers and its page tables count against.
const MEMORY: u64 = 160;
/// The agent's processor time by that of the attacker. It is a debug build here, about ten times as slow as a release.
const CPU_RATIO: f64 = if cfg!(debug_assertions) { 10.0 } else { 2.0 };
/// What the agent's processor time may be in any case: it varies by itself, and where tenants do nothing but change objects,
/// there is no attacker's to compare it with.
const CPU_FLOOR: Duration = Duration::from_millis(2500);
/// How much log an attack may make, in KiB.
const LOG: u64 = 256;

/// One measurement of a victim.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measurement {
    pub(crate) rounds: u64,
    /// Rounds that got somebody else's credentials, by whose they are.
    pub(crate) wrong: BTreeMap<String, u64>,
    pub(crate) failures: BTreeMap<String, u64>,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// How long another agent, or the same one started again, took until it was ready.
    pub(crate) replaced: Option<Duration>,
}

/// What an attack cost the agent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) agent_cpu: Duration,
    /// The agent's processor time in the control, for as long as the attack was measured.
    pub(crate) usual_cpu: Duration,
    pub(crate) attacker_cpu: Duration,
    /// The agent's peak of resident memory in MiB.
    pub(crate) memory: u64,
    /// KiB of log.
    pub(crate) log: u64,
    /// Connects that were denied as the agent had not renewed its lease.
    pub(crate) lapses: u64,
    /// Packets of pods at the metadata service.
    pub(crate) packets: u64,
}

/// What came of one row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) control: Measurement,
    pub(crate) attacked: Measurement,
    pub(crate) cost: Cost,
    /// Whether the row's conditions let the victim fail, though never be deceived.
    pub(crate) may_fail: bool,
    /// What else is wrong, as the row's own probes saw it.
    pub(crate) probes: Vec<String>,
    /// What the probes and the attackers said.
    pub(crate) notes: Vec<String>,
}

// === impl Measurement ===

impl Measurement {
    pub(crate) fn of(served: &VictimReport, lab: &Lab, role: &str) -> Self {
        let mut wrong = BTreeMap::new();
        for (key, count) in &served.keys {
            let owner = lab.sts.owner(key).map(|issued| issued.role);
            if owner.as_deref() != Some(&role_arn(role)) {
                *wrong.entry(owner.unwrap_or_else(|| key.clone())).or_default() += count;
            }
        }
        Self {
            rounds: served.rounds(),
            wrong,
            failures: served.failures.clone(),
            p50: served.percentile(50),
            p99: served.percentile(99),
            replaced: None,
        }
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

// === impl Cost ===

impl Cost {
    /// The agent's processor time for one of the attacker's.
    pub(crate) fn ratio(&self) -> f64 {
        let caused = self.agent_cpu.saturating_sub(self.usual_cpu);
        caused.as_secs_f64() / self.attacker_cpu.as_secs_f64().max(0.01)
    }

    fn is_dear(&self) -> bool {
        let caused = self.agent_cpu.saturating_sub(self.usual_cpu);
        caused > CPU_FLOOR && self.ratio() > CPU_RATIO
    }
}

// === impl Outcome ===

impl Outcome {
    /// Everything that is not as it must be.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = self.probes.clone();
        let mut must = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        let Self { control, attacked, cost, .. } = self;
        must(control.rounds > 0 && attacked.rounds > 0, "nothing was asked".to_owned());
        must(control.wrong.is_empty(), format!("wrong in the control: {:?}", control.wrong));
        must(control.failed() == 0, format!("failed in the control: {:?}", control.failures));
        must(attacked.wrong.is_empty(), format!("WRONG CREDENTIALS: {:?}", attacked.wrong));
        let fails = attacked.failed() > 0 && !self.may_fail;
        must(!fails, format!("failed: {:?}", attacked.failures));
        must(cost.packets == 0, format!("{} packets at the IMDS", cost.packets));
        must(cost.lapses == 0, format!("the lease lapsed: {} connects denied", cost.lapses));
        must(cost.memory <= MEMORY, format!("the agent's peak is {} MiB", cost.memory));
        must(!cost.is_dear(), format!("agent's CPU is {:.1} x the attacker's", cost.ratio()));
        must(cost.log <= LOG, format!("{} KiB of log", cost.log));
        let (took, usual) = (attacked.replaced.unwrap_or_default(), control.replaced);
        let most = READY.max(usual.unwrap_or_default() * SLOWER);
        must(took <= most, format!("the agent was ready after {took:.1?}, usually {usual:.1?}"));
        faults.extend(self.slowness());
        faults
    }

    /// Whether the victim's times are the only fault.
    pub(crate) fn is_only_slow(&self) -> bool {
        self.slowness().is_some() && self.faults().len() == 1
    }

    fn slowness(&self) -> Option<String> {
        let (p99, control) = (self.attacked.p99, self.control.p99);
        let most = (control * SLOWER).max(FLOOR).min(SLOWEST);
        (p99 > most && !self.may_fail)
            .then(|| format!("p99 is {p99:.1?}, in the control {control:.1?}"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { control, attacked, cost, .. } = self;
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        write!(
            f,
            "{:>5} {:>5} {:>6} {:>7.1} {:>7.1} {:>7.1} {:>7.1} {:>6} {:>5} {:>5.1} {:>5.1} {:>5.1} {:>5}",
            attacked.rounds,
            attacked.wrong.values().sum::<u64>(),
            attacked.failed(),
            ms(control.p50),
            ms(control.p99),
            ms(attacked.p50),
            ms(attacked.p99),
            cost.lapses,
            cost.memory,
            cost.agent_cpu.as_secs_f64(),
            cost.attacker_cpu.as_secs_f64(),
            cost.ratio(),
            cost.log,
        )
    }
}
