//! The model, and that it is the agent's.

use std::{
    collections::BTreeSet,
    future::ready,
    sync::{Arc, Mutex},
    time::Duration,
};

use kiam_core::{
    clock::Clock,
    credentials::{Config, Credentials, Prefetcher, PrefetcherParts, fixtures::FnSource},
    lifecycle,
    rate::Rate,
    role::{Claimant, RoleIdentity, SessionName as Name},
};
use tokio::{sync::watch, time::Instant};

use crate::{
    account::{Account, Answer},
    fleet::{Fleet, Policy, SessionName},
    plan::{Plan, Start},
    scenario::{CHURN, HOUR, MINUTE, Scenario, run},
    tally::quantile,
    world::{millis, simulate},
};

const NONE: std::ops::Range<Duration> = Duration::ZERO..Duration::ZERO;

fn names() -> [SessionName; 3] {
    [SessionName::Role, SessionName::ServiceAccount, SessionName::Pod]
}

fn day(start: Start) -> Plan {
    Plan { start, churn: Some(CHURN), rolling: None, outage: NONE, until: 6 * HOUR }
}

#[test]
fn all_is_renewed_before_it_expires_and_nothing_is_throttled_below_the_quota() {
    for name in names() {
        for duration in [15 * MINUTE, HOUR, 12 * HOUR] {
            let policy = Policy { chained: true, ..Policy::new(name, duration) };
            let found = simulate(Fleet::of(20), policy, day(Start::Steady), 7);
            let spread = found.tally.spread(0..millis(6 * HOUR));
            assert_eq!((found.bare, spread.throttled), (0, 0.0), "{policy:?}");
            assert!(found.tally.gaps.iter().all(|gap| !gap.lapsed), "{policy:?}");
            // All that is held is renewed: no fewer calls than lives, and no more than quarters of lives.
            let least = 6.0 * 3600.0 / duration.as_secs_f64();
            let sessions = f64::from(20 * Fleet::of(20).sessions(&policy));
            let calls = spread.total as f64;
            assert!(calls > sessions * least * 0.8, "{policy:?}: {calls}");
            let new = found.tally.gaps.len() as f64;
            assert!(calls - new <= sessions * (least * 4.0 + 1.0), "{policy:?}: {calls}");
        }
    }
}

#[test]
fn a_pod_waits_for_an_answer_of_sts_and_for_nothing_else() {
    let policy = Policy::new(SessionName::Pod, HOUR);
    let found = simulate(Fleet::of(50), policy, day(Start::Steady), 7);
    assert!(found.tally.gaps.len() > 5_000, "{}", found.tally.gaps.len());
    assert!(found.tally.gaps.iter().all(|gap| gap.until - gap.from < 150));
}

#[test]
fn the_same_seed_gives_the_same() {
    let simulated = |seed| {
        simulate(Fleet::of(50), Policy::new(SessionName::Role, HOUR), day(Start::Steady), seed)
    };
    assert_eq!(simulated(1), simulated(1));
    assert_ne!(simulated(1).tally, simulated(2).tally);
}

#[test]
fn no_more_is_issued_than_the_quota_whatever_is_asked() {
    let fleet = Fleet { quota: 20, ..Fleet::of(50) };
    let cold = Start::Cold(Duration::ZERO, Duration::ZERO);
    let plan = Plan { churn: None, until: HOUR / 2, ..day(cold) };
    let found = simulate(fleet, Policy::new(SessionName::Pod, 12 * HOUR), plan, 3);
    let mut issued = vec![0_u32; 1801];
    found.tally.gaps.iter().for_each(|gap| issued[(gap.until / 1000) as usize] += 1);
    // Answers of one second may be of calls of two.
    for (second, window) in issued.windows(10).enumerate() {
        let most = if second < 2 { 20 * 12 } else { 20 * 11 };
        assert!(window.iter().sum::<u32>() <= most, "{second}: {window:?}");
    }
    assert_eq!((found.tally.gaps.len(), found.bare), (5000, 0));
    assert!(found.tally.spread(0..60_000).throttled > 0.5);
}

#[test]
fn an_account_throttles_by_its_bucket_and_throttled_calls_take_nothing() {
    let (start, second) = (Instant::now(), Duration::from_secs(1));
    let rate = Fleet { quota: 10, ..Fleet::of(50) }.account_rate();
    let mut account = Account::new(rate, start, 100 * second..200 * second);
    let mut issued =
        |at: Duration| (0..50).filter(|_| account.ask(start + at) == Answer::Issued).count();
    assert_eq!([Duration::ZERO, second / 2, second * 2].map(&mut issued), [10, 5, 10]);
    assert_eq!([100, 199, 200].map(|at| issued(second * at)), [0, 0, 10]);
}

#[test]
fn a_node_asks_no_more_than_its_rate() {
    let sts_rate = Rate { burst: 5, period: Duration::from_secs(1) };
    let fleet = Fleet { sts_rate, ..Fleet::of(1) };
    let plan = Plan { churn: None, ..day(Start::Cold(Duration::ZERO, Duration::ZERO)) };
    let found = simulate(fleet, Policy::new(SessionName::Pod, 12 * HOUR), plan, 3);
    assert_eq!(found.tally.spread(0..1000).total, 5);
    let minute = found.tally.spread(0..60_000).total;
    assert!((62..=65).contains(&minute), "{minute}");
}

#[test]
fn a_warm_rollout_asks_for_nothing_and_a_cold_one_for_everything_once() {
    let policy = Policy::new(SessionName::Role, 12 * HOUR);
    let calls = |scenario| run(Fleet::of(200), policy, scenario, 5);
    let (warm, cold) = (
        calls(Scenario::Rolling { warm: true, slow: false }),
        calls(Scenario::Rolling { warm: false, slow: false }),
    );
    assert_eq!((warm.waits.count, cold.waits.count), (0, 200 * 20));
    assert!(warm.restarted_at.is_some() && warm.restarted_at <= cold.restarted_at);
    assert_eq!((warm.bare, cold.bare), (0, 0));
}

#[test]
fn an_outage_takes_only_what_expires_in_it() {
    let found = |duration, lasts| {
        run(Fleet::of(50), Policy::new(SessionName::Role, duration), Scenario::Outage(lasts), 5)
    };
    let (short, long) = (found(HOUR, 15 * MINUTE), found(HOUR, 3 * HOUR));
    assert_eq!((short.lapsed, short.bare), (0, 0));
    assert_eq!((long.lapsed, long.bare), (50 * 20, 0));
    assert_eq!(found(12 * HOUR, 3 * HOUR).lapsed, 0);
}

/// Seconds between two calls for one session, sorted, of a real prefetcher that keeps 20
/// for eight lives.
async fn intervals_of_the_agent(life: Duration) -> Vec<f64> {
    let (clock, start) =
        (Clock::simulated(std::time::SystemTime::UNIX_EPOCH + 1000 * HOUR), Instant::now());
    let identities: Vec<RoleIdentity> = (0..20)
        .map(|role| {
            let role = format!("arn:aws:iam::123456789012:role/r{role}").parse().unwrap();
            RoleIdentity::new(role, Name::sanitised("kiam-kiam"), life)
        })
        .collect();
    let wanted = |identity: &RoleIdentity| {
        (identity.clone(), BTreeSet::from([Claimant::new("shop", "pod")]))
    };
    let (_sender, wanted) = watch::channel(Arc::new(identities.iter().map(wanted).collect()));
    let issued = Arc::<Mutex<Vec<_>>>::default();
    let (noted, wall) = (Arc::clone(&issued), clock.clone());
    // Issues at once and notes when.
    let source = FnSource(move |identity: &RoleIdentity| {
        noted.lock().unwrap().push((identity.clone(), start.elapsed()));
        ready(Ok(Credentials::test(&identity.role, "ASIA", wall.now(), life)))
    });
    let parts = PrefetcherParts::test(source, clock, wanted);
    let (prefetcher, _reader) = Prefetcher::new(Config::default(), parts);
    let (_signal, drain) = lifecycle::drain();
    let _ = tokio::time::timeout(8 * life, prefetcher.run(drain)).await;
    let issued = issued.lock().unwrap();
    let of = |identity: &RoleIdentity| -> Vec<Duration> {
        issued.iter().filter(|(other, _)| other == identity).map(|(_, at)| *at).collect()
    };
    let each = identities.iter().map(of);
    let gaps = each.flat_map(|times| {
        times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect::<Vec<_>>()
    });
    sorted(gaps.collect())
}

fn sorted(mut numbers: Vec<f64>) -> Vec<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers
}

#[tokio::test(start_paused = true)]
async fn sessions_are_renewed_when_the_agent_itself_renews_them() {
    fastrand::seed(11);
    for life in [15 * MINUTE, 30 * MINUTE, HOUR] {
        let agent = intervals_of_the_agent(life).await;
        let policy = Policy::new(SessionName::Role, life);
        let model = sorted((0..5000).map(|_| policy.renewal().as_secs_f64()).collect());
        for share in [0.1, 0.25, 0.5, 0.75, 0.9] {
            let (agent, model) =
                (quantile(&agent, share).unwrap(), quantile(&model, share).unwrap());
            let apart = (agent - model).abs() / model;
            assert!(apart < 0.06, "{life:?} at {share}: the agent {agent} s, the model {model} s");
        }
    }
}
