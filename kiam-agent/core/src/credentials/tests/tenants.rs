//! What tenants may try against the node's share of STS, and what a silent watch stops.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Pods, each `(namespace, pod, role)`.
fn pods<'a>(pods: impl IntoIterator<Item = (&'a str, &'a str, &'a str)>) -> WantedRoles {
    let mut wanted: std::collections::BTreeMap<_, BTreeSet<_>> = Default::default();
    for (namespace, pod, role) in pods {
        wanted.entry(identity(role)).or_default().insert(Claimant::new(namespace, pod));
    }
    Arc::new(wanted)
}

/// Each of `names` is a pod that wants the role of its name.
fn own<'a>(
    namespace: &'a str,
    names: &'a [String],
) -> impl Iterator<Item = (&'a str, &'a str, &'a str)> {
    names.iter().map(move |name| (namespace, name.as_str(), name.as_str()))
}

fn slow(per_second: u32, burst: u32) -> Config {
    let sts_rate = Rate { burst, period: SECOND / per_second };
    Config { sts_rate, ..Config::default() }
}

fn waiting(fixture: &Fixture, reason: &str) -> i64 {
    let mut text = String::new();
    encode(&mut text, &fixture.registry).unwrap();
    let series = format!("kiam_credentials_waiting{{reason=\"{reason}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap()
}

fn limit(fixture: &Fixture, role: &str) -> Option<Limit> {
    match fixture.reader.get(&identity(role)) {
        Some(State::Pending(limit)) => limit,
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_changes_its_annotations_in_a_loop_gets_its_share_and_no_more() {
    let fixture = start_with(Config::default(), pods([]), false, HOUR);
    let mut most = 0;
    for n in 0..6000 {
        fixture.wanted.send_replace(pods([("bad", "loop", &*format!("r{n}"))]));
        sleep(SECOND / 10).await;
        let held = fixture.reader.summary();
        most = most.max(held.ready + held.pending + held.failed);
    }
    // Three at once, and one each 20 s of ten minutes.
    assert!((30..=34).contains(&fixture.all_calls()), "{}", fixture.all_calls());
    // What lingers for a minute, and the one that is wanted: not the 600 that were wanted in it.
    assert!(most <= 8, "{most}");
    assert_eq!(limit(&fixture, "r5999"), Some(Limit::Pod));
    assert_eq!(waiting(&fixture, "Pod"), 1);
    let with_good = [("bad", "loop", "r5999"), ("bad", "good", "mine"), ("other", "good", "yours")];
    fixture.wanted.send_replace(pods(with_good));
    sleep(SECOND).await;
    assert!(fixture.key("mine").is_some() && fixture.key("yours").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_namespace_that_makes_ever_new_pods_leaves_the_others_theirs() {
    let life = Duration::from_secs(1200);
    let fixture = start_with(Config::default(), pods([("other", "held", "held")]), false, life);
    sleep(SECOND).await;
    let mut late = 0;
    for n in 0..1800_u32 {
        let job = format!("job{}", n / 60);
        let names: Vec<String> = (0..20).map(|i| format!("p{n}-{i}")).collect();
        let flood = own("bad", &names);
        let others = [("other", "held", "held"), ("other", &*job, &*job)];
        fixture.wanted.send_replace(pods(flood.chain(others)));
        sleep(SECOND).await;
        assert!(fixture.key("held").is_some(), "after {n} s");
        late += u32::from(fixture.key(&job).is_none());
    }
    assert_eq!(late, 0, "a new pod of another namespace waited for more than a second");
    let renewals = fixture.calls("held");
    assert!((4..=8).contains(&renewals), "{renewals}");
    let bad = fixture.all_calls() - renewals - 30;
    assert!((1800..=1852).contains(&bad), "fifty, and one a second: {bad}");
    assert!(waiting(&fixture, "Namespace") > 10);
}

#[tokio::test(start_paused = true)]
async fn new_things_of_everybody_do_not_starve_renewals_nor_renewals_them() {
    let life = Duration::from_secs(1800);
    let held: Vec<String> = (0..60).map(|n| format!("held{n}")).collect();
    let fixture = start_with(slow(1, 100), pods(own("steady", &held)), false, life);
    sleep(SECOND * 60).await;
    assert_eq!(fixture.all_calls(), 60);
    // Far more than one call a second is wanted, of each of ten namespaces.
    let mut new = 0;
    for n in 0..100 {
        let names: Vec<(String, String)> = (0..10)
            .flat_map(|ns| (0..5).map(move |i| (format!("ns{ns}"), format!("p{n}-{ns}-{i}"))))
            .collect();
        let flood = names.iter().map(|(ns, pod)| (ns.as_str(), pod.as_str(), pod.as_str()));
        fixture.wanted.send_replace(pods(flood.chain(own("steady", &held))));
        sleep(SECOND * 20).await;
        new += names.iter().filter(|(_, pod)| fixture.key(pod).is_some()).count();
        assert!(held.iter().all(|role| fixture.key(role).is_some()), "lost one in round {n}");
    }
    assert!(waiting(&fixture, "Node") > 10);
    assert!(held.iter().all(|role| fixture.calls(role) >= 2));
    assert!(new > 1000, "{new} of the flood");
    let calls = fixture.all_calls();
    assert!(calls <= 100 + 2060 + 1, "{calls}");
}

#[tokio::test(start_paused = true)]
async fn what_is_held_for_another_pod_costs_nothing() {
    let held: Vec<String> = (0..20).map(|n| format!("held{n}")).collect();
    let others: Vec<_> = own("other", &held).collect();
    let fixture = start_with(Config::default(), pods(others.clone()), false, HOUR);
    sleep(SECOND).await;
    for role in &held {
        let all = others.iter().copied().chain([("shop", "fickle", role.as_str())]);
        fixture.wanted.send_replace(pods(all));
        sleep(SECOND / 10).await;
    }
    for n in 0..3 {
        let role = format!("new{n}");
        fixture.wanted.send_replace(pods([("shop", "fickle", role.as_str())]));
        sleep(SECOND / 10).await;
        assert!(fixture.key(&role).is_some(), "{role}");
    }
    assert_eq!(fixture.all_calls(), 23);
}

#[tokio::test(start_paused = true)]
async fn a_pod_with_a_request_comes_first_in_its_namespace() {
    let names: Vec<String> = (0..20).map(|n| format!("p{n:02}")).collect();
    let shop = own("shop", &names);
    let fixture = start_with(slow(1, 1), pods(shop.chain([("x", "other", "other")])), false, HOUR);
    let hold = SECOND * 10;
    let asked = fixture.reader.wait(&identity("p19"), hold).await;
    assert!(matches!(asked, Some(State::Ready(_))));
    assert!(fixture.all_calls() <= 4, "{}", fixture.all_calls());
    sleep(SECOND * 30).await;
    assert!(names.iter().all(|name| fixture.key(name).is_some()));
}

#[tokio::test(start_paused = true)]
async fn what_pods_want_when_the_agent_starts_is_not_new() {
    let names: Vec<String> = (0..120).map(|n| format!("p{n}")).collect();
    let fixture = start_with(slow(10, 100), pods(own("shop", &names)), false, HOUR);
    sleep(SECOND).await;
    assert!(!fixture.readiness.is_ready(), "the node's bucket holds for everything");
    sleep(SECOND * 2).await;
    assert!(fixture.readiness.is_ready());
    assert_eq!(fixture.reader.summary().ready, 120);
    // And it used up nothing of what the namespace may have.
    let more: Vec<String> = (0..50).map(|n| format!("new{n}")).collect();
    fixture.wanted.send_replace(pods(own("shop", &names).chain(own("shop", &more))));
    sleep(SECOND * 10).await;
    assert_eq!(fixture.reader.summary().ready, 170);
}

#[tokio::test(start_paused = true)]
async fn a_full_node_that_has_booted_waits_for_sts_alone_and_nobody_for_the_largest_tenant() {
    let crowd: Vec<String> = (0..240).map(|n| format!("mob{n}")).collect();
    let others: Vec<String> = (0..10).map(|n| format!("shop{n}")).collect();
    let all = pods(own("mob", &crowd).chain(own("shop", &others)));
    let fixture = start_with(Config::default(), all, false, HOUR);
    // A call takes 20 ms, and sixteen are in flight: in two rounds each namespace has had sixteen turns.
    sleep(SECOND / 20).await;
    assert!(others.iter().all(|name| fixture.key(name).is_some()));
    assert!(fixture.reader.summary().ready < 60, "the rest takes its turns");
    sleep(SECOND * 2 / 5).await;
    assert!(fixture.readiness.is_ready());
    assert_eq!(fixture.reader.summary().ready, 250);
}

#[tokio::test(start_paused = true)]
async fn pods_that_a_tenant_makes_by_the_hundred_delay_no_renewal_and_no_other_pod() {
    let life = Duration::from_secs(5 * 60);
    let old: Vec<String> = (0..20).map(|n| format!("old{n}")).collect();
    let fixture = start_with(Config::default(), pods(own("shop", &old)), false, life);
    sleep(SECOND).await;
    let (mut crowd, mut renewed) = (Vec::new(), false);
    // For longer than credentials live, a hundred accounts more each ten seconds, that are wanted by as many pods.
    for round in 0..33_u32 {
        let first = crowd.len();
        crowd.extend((first..first + 100).map(|n| format!("mob{n}")));
        let late = [format!("late{round}")];
        let now = &crowd[first..];
        let shop = own("shop", &old).chain(own("other", &late));
        fixture.wanted.send_replace(pods(shop.chain(own("mob", now))));
        sleep(SECOND).await;
        assert!(fixture.key(&late[0]).is_some(), "round {round}: a pod of another namespace waits");
        let served = old.iter().all(|name| fixture.key(name).is_some());
        assert!(served, "round {round}: credentials of a running pod have expired");
        renewed |= old.iter().all(|name| fixture.calls(name) > 1);
        sleep(SECOND * 9).await;
    }
    assert!(renewed);
}

#[tokio::test(start_paused = true)]
async fn two_hundred_pods_of_twenty_roles_take_twenty_calls() {
    let names: Vec<(String, String)> =
        (0..200).map(|n| (format!("p{n}"), format!("r{}", n % 20))).collect();
    let all = names.iter().map(|(pod, role)| ("shop", pod.as_str(), role.as_str()));
    let fixture = start_with(Config::default(), pods(all), false, HOUR);
    sleep(SECOND).await;
    assert!(fixture.readiness.is_ready());
    assert_eq!((fixture.reader.summary().ready, fixture.all_calls()), (20, 20));
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_too_much_keeps_no_agent_from_being_ready() {
    let first = [("shop", "a", "a"), ("shop", "b", "b"), ("shop", "c", "c")];
    let fixture = start_with(slow(1, 1), pods(first), false, HOUR);
    sleep(SECOND / 2).await;
    let greedy: Vec<String> = (0..10).map(|n| format!("r{n}")).collect();
    let loops = greedy.iter().map(|role| ("bad", "loop", role.as_str()));
    fixture.wanted.send_replace(pods(first.into_iter().chain(loops)));
    sleep(SECOND).await;
    assert!(!fixture.readiness.is_ready(), "the first have not all been answered");
    sleep(SECOND * 7).await;
    assert_eq!((fixture.readiness.is_ready(), waiting(&fixture, "Pod")), (true, 7));
    assert!(first.iter().all(|(.., role)| fixture.key(role).is_some()));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_denied_again_and_again_is_heard_less_often() {
    let fixture = start_with(Config::default(), pods([]), false, HOUR);
    fixture.source.denying.store(true, Ordering::Relaxed);
    for n in 0..600 {
        fixture.wanted.send_replace(pods([("bad", "loop", &*format!("r{n}"))]));
        sleep(SECOND).await;
    }
    // 15 s, 30 s, 60 s, ... after the second, or half of that; without it there would be 32.
    assert!((4..=10).contains(&fixture.all_calls()), "{}", fixture.all_calls());
    assert_eq!(limit(&fixture, "r599"), Some(Limit::Denied));
}

#[tokio::test(start_paused = true)]
async fn a_silent_watch_stops_renewals_but_takes_nothing_that_is_held() {
    let config = Config { max_staleness: Some(HOUR * 2), ..Config::default() };
    let fixture = start_with(config, set(&["a"]), false, HOUR);
    sleep(SECOND).await;
    *fixture.silence.lock().unwrap() = HOUR * 2;
    sleep(SECOND * 37 * 60).await;
    assert_eq!(fixture.calls("a"), 2, "it is not longer than that");
    *fixture.silence.lock().unwrap() = HOUR * 2 + SECOND;
    fixture.wanted.send_replace(set(&["a", "b"]));
    sleep(SECOND * 46 * 60).await;
    assert_eq!((fixture.key("a").as_deref(), fixture.calls("a")), (Some("ASIA2"), 2));
    assert_eq!(limit(&fixture, "b"), Some(Limit::Stale));
    assert_eq!(waiting(&fixture, "Stale"), 2);
    sleep(SECOND * 14 * 60).await;
    assert_eq!((fixture.key("a"), limit(&fixture, "a")), (None, Some(Limit::Stale)));
    *fixture.silence.lock().unwrap() = Duration::ZERO;
    sleep(SECOND * 2).await;
    assert!(fixture.key("a").is_some() && fixture.key("b").is_some());
    assert_eq!(waiting(&fixture, "Stale"), 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_bound_renewals_go_on_however_long_the_watch_is_silent() {
    let config = Config { max_staleness: None, ..Config::default() };
    let fixture = start_with(config, set(&["a"]), false, HOUR);
    *fixture.silence.lock().unwrap() = HOUR * 10_000;
    sleep(HOUR * 3).await;
    assert!(fixture.key("a").is_some() && fixture.calls("a") >= 5);
}
