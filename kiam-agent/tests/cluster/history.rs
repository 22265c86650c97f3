//! Lists and events that are old, lost, or out of order.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

/// What a scripted server says to a request line.
enum Reply {
    List(Value),
    Status(u16),
    /// The watch opens with these lines and stays open.
    Watch(Vec<Value>),
}

/// A server that says what its script says. Each answer ends its connection. Returns the address and the heads
/// of the requests.
async fn scripted<S, F>(script: S) -> (String, Arc<Mutex<Vec<String>>>)
where
    S: Fn(String) -> F + Clone + Send + 'static,
    F: Future<Output = Reply> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (script, log) = (script.clone(), Arc::clone(&log));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let head = String::from_utf8(head).unwrap();
                log.lock().unwrap().push(head.clone());
                let line = |status: u16| {
                    format!(
                        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
                    )
                };
                let (status, text, open) = match script(head).await {
                    Reply::List(body) => (200, body.to_string(), false),
                    Reply::Status(code) => {
                        let body = json!({"kind": "Status", "status": "Failure", "code": code});
                        (code, body.to_string(), false)
                    }
                    Reply::Watch(lines) => {
                        (200, lines.iter().map(|line| format!("{line}\n")).collect(), true)
                    }
                };
                stream.write_all((line(status) + &text).as_bytes()).await?;
                if open {
                    stream.read_u8().await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    (address, heads)
}

fn listed(version: &str, items: Value) -> Reply {
    Reply::List(json!({"metadata": {"resourceVersion": version}, "items": items}))
}

#[tokio::test]
async fn a_history_that_is_gone_is_listed_anew_however_the_server_says_so() {
    for gone in [Gone::Status, Gone::Event] {
        let api = server();
        api.say_gone_as(gone);
        api.apply_pod(&pod("a", 1));
        api.apply_pod(&pod("b", 2));
        let fed = Fed::with(&api, |_| {}).await;
        fed.has(&["a", "b"]).await;
        api.stop();
        api.delete_pod("team", "a");
        api.compact();
        api.restart().unwrap();
        fed.has(&["b"]).await;
        let expired = r#"kiam_cluster_watch_restarts_total{resource="Pods",reason="Expired"}"#;
        fed.until("the count", || fed.metric(expired).is_some()).await;
    }
}

#[tokio::test]
async fn lost_events_are_healed_by_the_next_list() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let fed = Fed::with(&api, |config| config.sync_interval = Duration::from_millis(300)).await;
    api.stall_watches(true);
    api.delete_pod("team", "a");
    api.apply_pod(&pod("b", 2));
    fed.has(&["b"]).await;
    let lists = api.lists(Resource::Pods);
    fed.until("two more lists", || api.lists(Resource::Pods) > lists + 1).await;
    assert_eq!(api.lists(Resource::Namespaces), 1, "every node would list all of them");
    assert!(fed.reader.silence().unwrap() < Duration::from_secs(5), "a list counts as heard from");
}

#[tokio::test]
async fn repeated_and_reordered_events_change_nothing() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let say = |kind: &str, name: &str, n: u32, version: u32, role: &str| {
        let mut object = object(name, n, &version.to_string());
        object["metadata"]["annotations"] = json!({"iam.amazonaws.com/role": role});
        api.inject(&json!({"type": kind, "object": object}).to_string());
    };
    say("ADDED", "a", 1, 2000, "reader");
    say("MODIFIED", "a", 1, 2010, "writer");
    say("MODIFIED", "a", 1, 2010, "writer");
    say("ADDED", "a", 1, 2000, "reader");
    say("ADDED", "mark", 8, 2020, "none");
    fed.has(&["a", "mark"]).await;
    assert_eq!(fed.role("a").as_deref(), Some("writer"), "the newest record holds");

    // A pod of the same name, and late news of the one before.
    say("ADDED", "a", 2, 2040, "admin");
    say("DELETED", "a", 1, 2030, "writer");
    say("MODIFIED", "a", 1, 2025, "reader");
    say("DELETED", "a", 1, 2030, "writer");
    say("DELETED", "mark", 8, 2050, "none");
    fed.has(&["a"]).await;
    assert_eq!(fed.role("a").as_deref(), Some("admin"));
    assert!(fed.reader.find(&attested(1)).is_err(), "it does not come back");
    assert!(fed.reader.find(&attested(2)).is_ok());
}

#[tokio::test]
async fn a_list_that_lags_behind_is_asked_for_again_from_etcd_and_rolls_nothing_back() {
    let (address, heads) = scripted(|head| async move {
        if head.contains("/namespaces") {
            return if head.contains("watch=") {
                Reply::Watch(vec![])
            } else {
                listed("1", json!(null))
            };
        }
        match (head.contains("watch="), head.contains("resourceVersion=")) {
            // The watch is ahead of the cache that lists are made from: b is there, a is not.
            (true, _) => Reply::Watch(vec![
                json!({"type": "ADDED", "object": object("b", 2, "120")}),
                json!({"type": "DELETED", "object": object("a", 1, "130")}),
            ]),
            (false, true) => listed("100", json!([object("a", 1, "90"), {"metadata": 5}])),
            (false, false) => listed("140", json!([object("b", 2, "120"), object("c", 3, "135")])),
        }
    })
    .await;
    let fed = Fed::by(&address, |_| {}).await;
    fed.has(&["b"]).await;
    assert!(fed.reader.wait(&attested(3), PATIENCE).await.is_ok());
    fed.has(&["b", "c"]).await;
    let lagging = r#"kiam_cluster_lists_total{resource="Pods",outcome="Lagging"}"#;
    assert_eq!(fed.metric(lagging).as_deref(), Some("1"));
    let agent = format!("user-agent: kiam-agent/{}\r\n", env!("CARGO_PKG_VERSION"));
    assert!(heads.lock().unwrap().iter().all(|head| head.to_lowercase().contains(&agent)));
}

#[tokio::test]
async fn a_list_from_etcd_is_taken_page_by_page_and_begun_anew_when_a_page_has_expired() {
    let expired = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (address, heads) = scripted(move |head| {
        let expired = Arc::clone(&expired);
        async move {
            if head.contains("/namespaces") {
                return match head.contains("watch=") {
                    true => Reply::Watch(vec![]),
                    false => listed("1", json!(null)),
                };
            }
            if head.contains("watch=") {
                return Reply::Watch(vec![]);
            }
            // The cache never catches up, so that etcd is asked.
            if head.contains("resourceVersion=") {
                return Reply::Status(504);
            }
            if head.contains("continue=next") {
                return match expired.swap(true, std::sync::atomic::Ordering::SeqCst) {
                    false => Reply::Status(410),
                    true => listed("140", json!([object("b", 2, "120")])),
                };
            }
            let metadata = json!({"resourceVersion": "140", "continue": "next"});
            Reply::List(json!({"metadata": metadata, "items": [object("a", 1, "90")]}))
        }
    })
    .await;
    let fed = Fed::by(&address, |_| {}).await;
    fed.until("the first list", || fed.readiness.is_ready()).await;
    assert_eq!(fed.names(), ["a", "b"], "the list is taken as a whole");
    let heads = heads.lock().unwrap();
    let pages = heads.iter().filter(|head| head.contains("/pods") && head.contains("limit=500"));
    let pages: Vec<bool> = pages.map(|head| head.contains("continue=next")).collect();
    assert_eq!(pages, [false, true, false, true]);
}

#[tokio::test]
async fn a_history_that_went_back_is_taken_as_it_is() {
    let restored = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let switch = Arc::clone(&restored);
    let (address, heads) = scripted(move |head| {
        let restored = switch.load(std::sync::atomic::Ordering::SeqCst);
        async move {
            match (head.contains("watch="), restored) {
                (true, true) if head.contains("resourceVersion=40") => {
                    Reply::Watch(vec![json!({"type": "ADDED", "object": object("new", 3, "41")})])
                }
                // As from a future that the server has not seen.
                (true, true) => Reply::Status(504),
                (true, false) => Reply::Watch(vec![]),
                (false, true) => listed("40", json!([object("old", 1, "30")])),
                (false, false) => {
                    listed("900", json!([object("old", 1, "800"), object("lost", 2, "850")]))
                }
            }
        }
    })
    .await;
    let fed = Fed::by(&address, |config| config.sync_interval = Duration::from_millis(500)).await;
    fed.has(&["lost", "old"]).await;
    restored.store(true, std::sync::atomic::Ordering::SeqCst);
    fed.has(&["new", "old"]).await;
    let heads = heads.lock().unwrap();
    assert!(heads.iter().any(|head| head.contains("pods") && !head.contains("resourceVersion")));
}
