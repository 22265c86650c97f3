//! When the API server counts as heard from, and what happens in a silence.

use super::*;

#[tokio::test]
async fn a_bookmark_is_a_sign_of_life_and_says_where_to_go_on() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let silence = || fed.reader.silence().unwrap();
    fed.until("silence", || silence() > Duration::from_millis(300)).await;
    api.skip_version();
    api.bookmark_every(Duration::from_millis(50));
    fed.until("a bookmark", || silence() < Duration::from_millis(200)).await;
    // What was before the bookmark may be forgotten now: the next watch starts behind it.
    api.compact();
    api.close_watches();
    eventually("other watches", || api.watches(Resource::Pods) == 2).await;
    api.apply_pod(&pod("a", 1));
    fed.has(&["a"]).await;
    assert_eq!(api.lists(Resource::Pods), 1);
}

#[tokio::test]
async fn after_a_silent_watch_there_is_a_list_and_another_watch() {
    let api = server();
    let fed = Fed::with(&api, |config| config.stall = Duration::from_secs(1)).await;
    api.stall_watches(true);
    api.apply_pod(&pod("a", 1));
    fed.has(&["a"]).await;
    eventually("another watch", || api.watches(Resource::Pods) > 1).await;
    assert!(api.lists(Resource::Pods) > 1, "the watches say nothing");
    fed.until("news", || fed.reader.silence().unwrap() < Duration::from_secs(1)).await;

    api.stall_watches(false);
    api.bookmark_every(Duration::from_millis(50));
    api.close_watches();
    let bookmarks = || {
        let count = fed.metric(r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#);
        count.map_or(0, |count| count.parse::<u32>().unwrap())
    };
    fed.until("a bookmark", || bookmarks() > 0).await;
    let (lists, first) = (api.lists(Resource::Pods), bookmarks());
    fed.until("two seconds of bookmarks", || bookmarks() >= first + 40).await;
    assert_eq!(api.lists(Resource::Pods), lists, "bookmarks are no silence");
}

#[tokio::test]
async fn refused_namespaces_are_a_silence_though_the_pods_go_on() {
    let api = server();
    api.bookmark_every(Duration::from_millis(20));
    let fed = Fed::with(&api, |config| config.prove_after = Duration::from_millis(300)).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let refused =
        api.faults().inject(Injected::refuse(403, "Forbidden").path("/api/v1/namespaces"));
    api.close_watches();
    let quiet = Duration::from_secs(2);
    fed.until("a silence", || fed.reader.silence().unwrap() > quiet).await;
    let metric = r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#;
    let bookmarks = || fed.metric(metric).map_or(0, |count| count.parse::<u32>().unwrap());
    let before = bookmarks();
    fed.until("bookmarks of pods", || bookmarks() >= before + 20).await;
    assert!(fed.reader.silence().unwrap() > quiet);
    refused.lift();
    fed.until("an end of it", || fed.reader.silence().unwrap() < quiet).await;
}

/// What this mode, kiam's, can't tell: whose an address is while nothing is heard. So it is not believed for long.
#[tokio::test]
async fn an_address_is_not_believed_once_the_watch_has_been_black_holed_for_90_s() {
    let api = server();
    let address = "10.0.0.1".parse().unwrap();
    api.apply_pod(&pod("old", 1).running(&[address]));
    let fed = Fed::with(&api, |config| config.stall = Duration::from_secs(90)).await;
    let client = Client::Address(address);
    let found = || fed.reader.find(&client).map(|pod| pod.name.clone());
    assert_eq!(found().as_deref(), Ok("old"));
    // Connections stay open, and nothing comes through them any more, whatever is asked.
    eventually("both watches", || api.open_watches() == 2).await;
    api.stall_watches(true);
    let hanging = api.faults().inject(Injected::hang());
    api.delete_pod("team", "old");
    api.apply_pod(&pod("new", 2).running(&[address]));
    time::pause();
    time::advance(Duration::from_secs(90)).await;
    assert_eq!(found(), Err(NotFound::Stale));
    time::resume();
    eventually("another watch", || hanging.met() > 0).await;
    let waited = fed.reader.wait(&client, Duration::from_millis(200)).await;
    assert_eq!(waited.err(), Some(NotFound::Stale), "an open connection is no news");
    api.stall_watches(false);
    hanging.lift();
    fed.until("whose it is now", || found().as_deref() == Ok("new")).await;
}

/// Such a server answers, keeps its watches open and sends bookmarks, and knows nothing of what happens.
#[tokio::test]
async fn a_server_that_is_cut_off_from_etcd_gives_no_sign_of_life() {
    let api = server();
    api.bookmark_every(Duration::from_millis(50));
    let address = "10.0.0.1".parse().unwrap();
    api.apply_pod(&pod("old", 1).running(&[address]));
    let fed = Fed::with(&api, |config| {
        config.prove_after = Duration::from_millis(300);
        config.sync_interval = Duration::from_millis(200);
    });
    let fed = fed.await;
    let client = Client::Address(address);
    let found = || fed.reader.find(&client).map(|pod| pod.name.clone());
    let silence = || fed.reader.silence().unwrap();
    eventually("both watches", || api.open_watches() == 2).await;
    assert_eq!(found().as_deref(), Ok("old"));
    api.cut_from_etcd(true);
    api.delete_pod("team", "old");
    api.apply_pod(&pod("new", 2).running(&[address]));
    fed.until("a silence", || silence() > Duration::from_secs(2)).await;
    let metric = r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#;
    let bookmarks = || fed.metric(metric).map_or(0, |count| count.parse::<u32>().unwrap());
    let before = bookmarks();
    fed.until("bookmarks", || bookmarks() >= before + 10).await;
    // Nor does a watch that is opened there anew, after a list.
    api.close_watches();
    eventually("other watches", || api.watches(Resource::Pods) > 1).await;
    time::pause();
    time::advance(Duration::from_secs(90)).await;
    time::resume();
    assert_eq!(found(), Err(NotFound::Stale));
    assert!(fed.reader.find(&attested(1)).is_ok(), "what is attested is known to be the pod");
    api.cut_from_etcd(false);
    fed.until("whose it is now", || found().as_deref() == Ok("new")).await;
}

#[tokio::test]
async fn where_the_watch_tells_nothing_new_a_list_proves_that_there_is_nothing_and_else_none_is_made()
 {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let fed = Fed::with(&api, |config| config.prove_after = Duration::from_millis(300)).await;
    let proofs = || {
        let seen = api.seen().into_iter().filter(|seen| seen.is_about(Resource::Pods));
        seen.filter(|seen| seen.query.contains_key("resourceVersionMatch")).count()
    };
    fed.until("three proofs", || proofs() > 3).await;
    assert!(fed.reader.silence().is_some());
    for seen in api.seen().iter().filter(|seen| seen.query.contains_key("limit")) {
        assert!(seen.is_about(Resource::Namespaces) && seen.query["limit"] == "1", "{seen:?}");
        assert!(!seen.query.contains_key("resourceVersion"), "of no cache: {seen:?}");
    }
    let (lists, version) = (api.lists(Resource::Pods), api.version());
    let mut own = api.seen().into_iter().filter(|seen| seen.is_about(Resource::Pods));
    let last = own.rfind(|seen| !seen.is_watch()).unwrap();
    assert_eq!(last.query["resourceVersion"], version.to_string());
    // Bookmarks that go on are proof enough.
    api.bookmark_every(Duration::from_millis(20));
    let begun = time::Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        api.skip_version();
        time::sleep(Duration::from_millis(20)).await;
    }
    assert!(api.lists(Resource::Pods) <= lists + 1, "one may have been under way");
}

/// As servers before 1.31 do where pods hardly ever change.
#[tokio::test]
async fn a_server_whose_cache_does_not_catch_up_is_asked_for_what_etcd_has() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let behind = Injected::refuse(504, "Timeout").field("resourceVersionMatch", "NotOlderThan");
    let behind = api.faults().inject(behind.path("/api/v1/pods").times(1));
    let fed = Fed::with(&api, |_| {}).await;
    fed.has(&["a"]).await;
    assert_eq!(behind.met(), 1);
    assert!(fed.reader.silence().is_some());
    assert_eq!(api.lists(Resource::Pods), 2);
    let lagging = r#"kiam_cluster_lists_total{resource="Pods",outcome="Lagging"}"#;
    assert_eq!(fed.metric(lagging).as_deref(), Some("1"));
}
