//! Roles that AWS denied and somebody mended: pods that come afterwards, and operators, need not wait for the next attempt.

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Pods of `namespace` that all want the role `r`.
fn pods<'a>(namespace: &str, pods: impl IntoIterator<Item = &'a str>) -> WantedRoles {
    let claimants: BTreeSet<_> =
        pods.into_iter().map(|pod| Claimant::new(namespace, pod)).collect();
    let wanted = (!claimants.is_empty()).then(|| (identity("r"), claimants));
    Arc::new(wanted.into_iter().collect())
}

/// The role `r` has been denied to the pod `old` for long, and has just been denied again.
async fn denied() -> Fixture {
    let fixture = start_with(Config::default(), pods("shop", ["old"]), false, HOUR);
    fixture.source.denying.store(true, Ordering::Relaxed);
    sleep(HOUR).await;
    let before = fixture.calls("r");
    while fixture.calls("r") == before {
        sleep(SECOND).await;
    }
    fixture
}

fn vouched(fixture: &Fixture) -> Vec<String> {
    fixture.source.vouched.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_recreated_after_its_role_was_mended_is_served_at_once() {
    let fixture = denied().await;
    fixture.source.denying.store(false, Ordering::Relaxed);
    sleep(MINUTE).await;
    assert_eq!(fixture.key("r"), None, "nobody tells that it was mended");
    // The pod is recreated, a moment after the other one went.
    fixture.wanted.send_replace(pods("shop", []));
    sleep(SECOND * 5).await;
    fixture.wanted.send_replace(pods("shop", ["new"]));
    sleep(SECOND).await;
    assert!(fixture.key("r").is_some());
    // The new pod vouches for itself.
    assert_eq!(vouched(&fixture).last().unwrap(), "new");
}

#[tokio::test(start_paused = true)]
async fn a_role_that_takes_some_seconds_to_mend_is_asked_for_again_soon() {
    let fixture = denied().await;
    fixture.wanted.send_replace(pods("shop", ["new"]));
    sleep(SECOND * 5).await;
    // IAM is eventually consistent: it was denied once more.
    fixture.source.denying.store(false, Ordering::Relaxed);
    sleep(SECOND * 15).await;
    assert!(fixture.key("r").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_puts_its_annotation_on_and_off_is_no_newcomer() {
    let fixture = denied().await;
    let before = fixture.all_calls();
    for n in 0..6000 {
        let on = n % 2 == 0;
        fixture.wanted.send_replace(pods("shop", on.then_some("old")));
        sleep(SECOND / 10).await;
    }
    // Ten minutes: the next attempt, and perhaps one more.
    assert!(fixture.all_calls() - before <= 2, "{}", fixture.all_calls() - before);
}

#[tokio::test(start_paused = true)]
async fn pods_that_are_recreated_in_a_loop_get_their_namespaces_share_and_no_more() {
    let fixture = denied().await;
    let before = fixture.all_calls();
    let mut late = 0;
    for n in 0..600 {
        let names: Vec<String> = (0..10).map(|i| format!("p{n}-{i}")).collect();
        let mut wanted = (*pods("bad", names.iter().map(String::as_str))).clone();
        let role = format!("good{n}");
        wanted.insert(identity(&role), BTreeSet::from([Claimant::new("other", &role)]));
        fixture.source.denying.store(true, Ordering::Relaxed);
        fixture.wanted.send_replace(Arc::new(wanted));
        sleep(SECOND).await;
        late += u32::from(fixture.calls(&role) == 0);
    }
    let bad = fixture.calls("r") - before;
    // Fifty, and one a second, at most; those of others come in between.
    assert!((300..=652).contains(&bad), "{bad}");
    assert_eq!(late, 0, "a pod of another namespace waited for more than a second");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_keeps_coming_with_its_uid_has_only_its_own_share() {
    let fixture = denied().await;
    let before = fixture.calls("r");
    // Another pod's call between makes it a newcomer again.
    for n in 0..600 {
        let names = if n % 2 == 0 { ["a", "b"] } else { ["c", "b"] };
        fixture.wanted.send_replace(pods("bad", names));
        sleep(SECOND).await;
    }
    // Each of two has three at once, and with each denial waits for longer; and what is tried again for all.
    assert!(fixture.calls("r") - before <= 40, "{}", fixture.calls("r") - before);
}

#[tokio::test(start_paused = true)]
async fn a_throttled_role_is_not_asked_for_again_because_pods_come() {
    let fixture = start_with(Config::default(), pods("shop", ["old"]), true, HOUR);
    sleep(HOUR).await;
    let before = fixture.calls("r");
    for n in 0..60 {
        fixture.wanted.send_replace(pods("shop", [&*format!("p{n}")]));
        sleep(SECOND).await;
    }
    assert!(fixture.calls("r") - before <= 2, "{}", fixture.calls("r") - before);
}

#[tokio::test(start_paused = true)]
async fn an_operator_has_it_asked_for_at_once_and_hears_what_came_of_it() {
    let fixture = denied().await;
    let refresh = |role: &str| fixture.refresher.refresh(identity(role), MINUTE / 3);
    let began = Instant::now();
    let error = refresh("r").await.unwrap_err();
    assert!(matches!(&error, RefreshError::Failed(why) if why.class == ErrorClass::Denied));
    fixture.source.denying.store(false, Ordering::Relaxed);
    refresh("r").await.unwrap();
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    let before = fixture.key("r");
    assert!(before.is_some());
    // What is held is asked for anew, and stays when that fails.
    refresh("r").await.unwrap();
    assert!(fixture.key("r").is_some() && fixture.key("r") != before);
    fixture.source.denying.store(true, Ordering::Relaxed);
    refresh("r").await.unwrap_err();
    assert!(fixture.key("r").is_some());
    assert!(matches!(refresh("unwanted").await, Err(RefreshError::Unwanted)));
    // Whatever it is, it is not asked of STS while what pods want may not be true.
    *fixture.silence.lock().unwrap() = HOUR * 25;
    assert!(matches!(refresh("r").await, Err(RefreshError::Unanswered(_))));
}

#[tokio::test(start_paused = true)]
async fn operators_ask_no_more_often_than_the_node_may() {
    let rate = Rate { burst: 1, period: SECOND };
    let config = Config { sts_rate: rate, ..Config::default() };
    let fixture = start_with(config, pods("shop", ["a"]), false, HOUR);
    sleep(SECOND * 10).await;
    let began = Instant::now();
    for _ in 0..5 {
        fixture.refresher.refresh(identity("r"), MINUTE / 3).await.unwrap();
    }
    assert!(began.elapsed() >= SECOND * 4, "{:?}", began.elapsed());
    // Those that come together share a call.
    let before = fixture.calls("r");
    let together = (0..10).map(|_| fixture.refresher.refresh(identity("r"), MINUTE / 3));
    let came = futures::future::join_all(together).await;
    assert!(came.iter().all(Result::is_ok));
    assert!(fixture.calls("r") - before <= 2);
}
