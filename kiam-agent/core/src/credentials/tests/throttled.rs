//! An account whose quota is used up, by others or by one tenant's pods.

use super::*;
use crate::role::AccountName;

const SECOND: Duration = Duration::from_secs(1);

/// `count` roles of `account`, each wanted by a pod of `namespace`, which vouches for it by token.
fn by_token(account: &str, namespace: &str, count: u32) -> WantedRoles {
    let wanted = (0..count).map(|n| {
        let role = format!("arn:aws:iam::{account}:role/r{n}").parse().unwrap();
        let mut identity = RoleIdentity::new(role, SessionName::sanitised("kiam-kiam"), HOUR);
        let name = format!("p{n}").into();
        identity.service_account = Some(AccountName { namespace: namespace.into(), name });
        (identity, BTreeSet::from([Claimant::new(namespace, &format!("p{n}"))]))
    });
    Arc::new(wanted.collect())
}

fn metric(fixture: &Fixture, name: &str) -> f64 {
    let mut text = String::new();
    encode(&mut text, &fixture.registry).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    value.trim().parse().unwrap()
}

/// Two calls a second are left of the quota, ten of them at once: 200 keys take 95 s at least.
#[tokio::test(start_paused = true)]
async fn throttled_node_asks_hardly_more_often_than_it_is_answered() {
    for seed in 0..2 {
        fastrand::seed(seed);
        let names: Vec<String> = (0..200).map(|n| format!("r{n}")).collect();
        let roles: Vec<&str> = names.iter().map(String::as_str).collect();
        let begun = Instant::now();
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + SECOND * 1_700_000_000);
        let source = source(clock, false, 12 * HOUR);
        let quota = Rate { burst: 10, period: SECOND / 2 };
        *source.quota.lock().unwrap() = Some((quota, Bucket::default()));
        let fixture = begin(Config::default(), set(&roles), source, Inheritance::default());
        let mut lowest = f64::MAX;
        while fixture.reader.summary().ready < 200 {
            sleep(SECOND).await;
            assert!(begun.elapsed() < HOUR, "{:?}", fixture.reader.summary());
            lowest = lowest.min(metric(&fixture, "kiam_credentials_calls_per_second "));
        }
        let (calls, took) = (fixture.all_calls(), begun.elapsed().as_secs());
        println!("seed {seed}: {calls} calls, {took} s, at the slowest {lowest:.2} a second");
        assert!(calls < 300, "{calls} calls");
        assert!(took < 130, "{took} s");
        assert!((0.1..=2.0).contains(&lowest), "{lowest}");
    }
}

#[tokio::test(start_paused = true)]
async fn account_that_throttles_its_own_roles_delays_no_other_accounts() {
    let mut wanted = WantedRoles::unwrap_or_clone(by_token(THROTTLED, "bad", 40));
    let fixture = start_with(Config::default(), Arc::new(wanted.clone()), false, HOUR);
    sleep(SECOND * 60).await;
    assert!(metric(&fixture, "kiam_credentials_calls_per_second ") < 0.5);
    assert!(metric(&fixture, "kiam_credentials_waiting{reason=\"Throttled\"} ") > 0.0);
    wanted.extend(WantedRoles::unwrap_or_clone(by_token("123456789012", "good", 40)));
    fixture.wanted.send_replace(Arc::new(wanted));
    sleep(SECOND).await;
    assert_eq!(fixture.reader.summary().ready, 40);
}
