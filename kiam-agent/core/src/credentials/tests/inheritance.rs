//! What one prefetcher leaves to the next.

use serde_json::{Value, json};

use super::*;
use crate::role::SessionTags;

const MINUTE: Duration = Duration::from_secs(60);

/// A successor on the same node, which wants `wanted` and is given `held`.
fn successor(of: &Fixture, wanted: WantedRoles, held: &[u8]) -> Fixture {
    let source = source(of.clock.clone(), false, HOUR);
    begin(Config::default(), wanted, source, Inheritance::read(held).unwrap())
}

/// What `fixture` holds, with `change` made to its first entry.
fn changed(fixture: &Fixture, change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut form: Value = serde_json::from_slice(&fixture.reader.bequeath()).unwrap();
    change(&mut form["held"][0]);
    serde_json::to_vec(&form).unwrap()
}

#[tokio::test(start_paused = true)]
async fn successor_asks_for_nothing_that_was_held_and_renews_it_when_it_is_due() {
    // Some draw may be at the turn of a minute.
    fastrand::seed(7);
    let names: Vec<String> = (0..20).map(|n| format!("r{n}")).collect();
    let roles: Vec<&str> = names.iter().map(String::as_str).collect();
    let first = start(&roles, false, HOUR);
    sleep(MINUTE * 23).await;
    assert_eq!(first.all_calls(), 20);
    let mut second = successor(&first, set(&roles), &first.reader.bequeath());
    sleep(Duration::from_millis(1)).await;
    assert!(second.readiness.is_ready(), "at once");
    for role in &roles {
        assert_eq!((second.key(role), second.calls(role)), (first.key(role), 0));
    }
    // And so on: what was drawn for each stays with it, however often it is handed over.
    for _ in 0..20 {
        sleep(MINUTE / 20).await;
        second = successor(&second, set(&roles), &second.reader.bequeath());
    }
    sleep(Duration::from_millis(1)).await;
    assert_eq!(second.all_calls(), 0, "the earliest renewal is after 24 minutes");
    // The first, which nobody has told to end, renews each in the same minute.
    for minute in 25..=36 {
        sleep(MINUTE).await;
        for role in &roles {
            assert_eq!(second.calls(role), first.calls(role) - 1, "{role} after {minute} minutes");
        }
    }
    assert_eq!(second.all_calls(), 20);
}

#[tokio::test(start_paused = true)]
async fn what_differs_in_anything_is_fetched_anew() {
    let first = start(&["a"], false, HOUR);
    sleep(MINUTE).await;
    let held = first.reader.bequeath();
    let same = identity("a");
    let tag = ("kubernetes-pod-name".to_owned(), "a".to_owned());
    let others = [
        identity("b"),
        RoleIdentity { session_name: SessionName::sanitised("kiam-other"), ..same.clone() },
        RoleIdentity { external_id: Some("other".parse().unwrap()), ..same.clone() },
        RoleIdentity { duration: HOUR / 2, ..same.clone() },
        RoleIdentity { source_identity: Some("web-0".parse().unwrap()), ..same.clone() },
        RoleIdentity { tags: SessionTags::new([tag]).unwrap(), ..same.clone() },
        RoleIdentity { policies: "arn:aws:iam::aws:policy/A".parse().unwrap(), ..same.clone() },
    ];
    for (wanted, calls) in others.into_iter().map(|other| (other, 1)).chain([(same, 0)]) {
        let claimants = BTreeSet::from([Claimant::new("shop", "a")]);
        let set = Arc::new([(wanted.clone(), claimants)].into());
        let second = successor(&first, set, &held);
        sleep(Duration::from_secs(1)).await;
        assert!(matches!(second.reader.get(&wanted), Some(State::Ready(_))));
        assert_eq!(second.all_calls(), calls, "{wanted:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_must_not_be_served_is_not_inherited() {
    let first = start(&["a"], false, HOUR);
    sleep(MINUTE).await;
    let expires = 1_700_000_030_000_u64;
    let changes: [(&str, Value); 8] = [
        ("role", json!("arn:aws:iam::123456789012:role/b")),
        ("secret_access_key", json!("")),
        ("expires", json!(expires)),
        ("expires", json!(u64::MAX)),
        ("age", json!(3_600_000)),
        ("age", json!(u64::MAX)),
        ("identity", json!(vec![7; 32])),
        ("issued", json!(expires + 10_000_000)),
    ];
    for (field, value) in changes {
        let held = changed(&first, |entry| entry[field] = value.clone());
        let second = successor(&first, set(&["a"]), &held);
        sleep(Duration::from_secs(1)).await;
        assert_eq!((second.key("a").as_deref(), second.calls("a")), (Some("ASIA1"), 1), "{field}");
    }
    // By the successor's own clocks: what is no good any more is not even left.
    first.source.failing.store(true, Ordering::Relaxed);
    let held = first.reader.bequeath();
    sleep(HOUR).await;
    let second = successor(&first, set(&["a"]), &held);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(second.calls("a"), 1);
    let left: Value = serde_json::from_slice(&first.reader.bequeath()).unwrap();
    assert_eq!(left["held"], json!([]));
}

#[tokio::test(start_paused = true)]
async fn role_whose_path_json_escapes_is_inherited_like_any_other() {
    let roles = [r#"team"a\b/reader"#, "plain"];
    let first = start(&roles, false, HOUR);
    sleep(MINUTE).await;
    let held = first.reader.bequeath();
    assert!(String::from_utf8_lossy(&held).contains(r#"team\"a\\b/reader"#));
    let second = successor(&first, set(&roles), &held);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(second.all_calls(), 0);
    assert_eq!(roles.map(|role| second.key(role)), roles.map(|role| first.key(role)));
}

#[tokio::test(start_paused = true)]
async fn what_is_odd_is_refused_as_a_whole() {
    let fixture = start(&["a"], false, HOUR);
    sleep(MINUTE).await;
    let held = fixture.reader.bequeath();
    let other_form = br#"{"version":2,"sessions":{}}"#;
    let error = Inheritance::read(other_form).unwrap_err();
    assert!(matches!(error, InheritanceError::Version(2)), "{error}");
    let odd = [
        changed(&fixture, |entry| entry["more"] = json!(1)),
        changed(&fixture, |entry| entry["role"] = json!("b")),
        changed(&fixture, |entry| entry["session_token"] = json!("SENTI\"NEL")),
        changed(&fixture, |entry| entry["draw"] = Value::Null),
        held[..held.len() - 1].to_vec(),
        [&held[..], b"x"].concat(),
        Vec::new(),
    ];
    for odd in odd {
        let shown = String::from_utf8_lossy(&odd).into_owned();
        let error = Inheritance::read(&odd).expect_err(&shown);
        assert!(!error.to_string().contains("SENTI"), "{error}");
    }
    assert_eq!(format!("{:?}", Inheritance::read(&held).unwrap()), "Inheritance(1)");
}
