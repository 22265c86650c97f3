//! The fake API server, asked over real HTTP.

use std::{
    io::{BufReader, Write},
    net::TcpStream,
};

use serde_json::{Value, json};

use super::*;
use crate::{
    fake::Injected,
    pod_client::wire::{self, Reply},
};

struct WatchStream(BufReader<TcpStream>);

impl WatchStream {
    fn next(&mut self) -> Option<Value> {
        let line = wire::chunk(&mut self.0).unwrap()?;
        Some(serde_json::from_slice(&line).unwrap())
    }

    /// Type, name, resource version.
    fn facts(&mut self) -> (String, String, String) {
        let event = self.next().unwrap();
        let metadata = &event["object"]["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&event["type"]), text(&metadata["name"]), text(&metadata["resourceVersion"]))
    }
}

fn server() -> Kubernetes {
    let api = Kubernetes::start(Place::loopback()).unwrap();
    api.bookmark_every(Duration::from_secs(600));
    api
}

fn get(api: &Kubernetes, path: &str, accept: &str) -> Reply {
    let mut stream = TcpStream::connect(api.address()).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: api\r\nAccept: {accept}\r\n\r\n");
    wire::exchange(&mut stream, &request).unwrap()
}

fn list(api: &Kubernetes, path: &str) -> Value {
    serde_json::from_str(&get(api, path, "application/json").body).unwrap()
}

fn watch(api: &Kubernetes, path: &str) -> (Reply, WatchStream) {
    let mut stream = TcpStream::connect(api.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: api\r\n\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    (wire::head(&mut reader).unwrap(), WatchStream(reader))
}

fn pod(name: &str, node: &str) -> PodRecord {
    PodRecord::scheduled("shop", name, &format!("uid-{name}"), node)
}

#[test]
fn a_list_shows_only_what_is_selected_and_its_version() {
    let api = server();
    api.apply_pod(&pod("a", "n1").running(&["10.0.0.1".parse().unwrap()]));
    let version = api.apply_pod(&pod("b", "n2"));
    let path = "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&resourceVersion=0";
    let listed = list(&api, path);
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    assert_eq!(listed["items"][0]["status"]["podIPs"][0]["ip"], "10.0.0.1");
    assert_eq!(listed["metadata"]["resourceVersion"], version.to_string());
    assert_eq!((api.lists(Resource::Pods), api.watches(Resource::Pods)), (1, 0));
    let accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
    api.apply_namespace(&NamespaceRecord::new("shop").annotation("k", "v"));
    let body = get(&api, "/api/v1/namespaces", accept).body;
    let listed: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(listed["kind"], "PartialObjectMetadataList");
    assert_eq!(listed["items"][0]["metadata"]["annotations"]["k"], "v");
    assert_eq!(listed["items"][0]["spec"], Value::Null);
}

#[test]
fn a_watch_goes_on_from_its_version_and_follows_its_selector() {
    let api = server();
    let from = api.apply_pod(&pod("a", "n1"));
    let added = api.apply_pod(&pod("b", "n1"));
    let path =
        format!("/api/v1/pods?watch=true&fieldSelector=spec.nodeName=n1&resourceVersion={from}");
    let (_, mut events) = watch(&api, &path);
    let fact = |kind: &str, name: &str, version: u64| {
        (kind.to_owned(), name.to_owned(), version.to_string())
    };
    assert_eq!(events.facts(), fact("ADDED", "b", added));
    let modified = api.apply_pod(&pod("b", "n1"));
    assert_eq!(events.facts(), fact("MODIFIED", "b", modified));
    let moved = api.apply_pod(&pod("b", "n2"));
    assert_eq!(events.facts(), fact("DELETED", "b", moved));
    let deleted = api.delete_pod("shop", "a");
    assert_eq!(events.facts(), fact("DELETED", "a", deleted));
    api.inject("{\"odd\":1}");
    assert_eq!(events.next().unwrap()["odd"], 1);
    api.close_watches();
    assert_eq!(events.next(), None);
}

#[test]
fn quiet_watches_get_bookmarks_and_stalled_ones_nothing() {
    let api = server();
    api.bookmark_every(Duration::from_millis(20));
    let path = "/api/v1/pods?watch=1&allowWatchBookmarks=true&resourceVersion=1000";
    let (_, mut events) = watch(&api, path);
    assert_eq!(events.facts().0, "BOOKMARK");
    api.stall_watches(true);
    api.apply_pod(&pod("a", "n1"));
    let timeout = Some(Duration::from_millis(300));
    events.0.get_ref().set_read_timeout(timeout).unwrap();
    let heard = std::iter::from_fn(|| wire::chunk(&mut events.0).ok().flatten());
    assert!(
        heard.map(|line| String::from_utf8(line).unwrap()).all(|line| line.contains("BOOKMARK"))
    );
}

#[test]
fn a_version_from_before_the_history_is_gone_either_way() {
    let api = server();
    let old = api.apply_pod(&pod("a", "n1"));
    api.skip_version();
    api.compact();
    let path = format!("/api/v1/pods?watch=true&resourceVersion={old}");
    let (head, mut events) = watch(&api, &path);
    assert_eq!(head.status, 200);
    let event = events.next().unwrap();
    assert_eq!((&event["type"], &event["object"]["code"]), (&"ERROR".into(), &410.into()));
    assert_eq!(events.next(), None);
    api.say_gone_as(Gone::Status);
    assert_eq!(watch(&api, &path).0.status, 410);
}

#[test]
fn a_restart_keeps_the_port_and_the_records() {
    let api = server();
    api.apply_pod(&pod("a", "n1"));
    api.stop();
    TcpStream::connect(api.address()).expect_err("nobody listens");
    api.restart().unwrap();
    assert_eq!(list(&api, "/api/v1/pods")["items"].as_array().unwrap().len(), 1);
}

#[test]
fn faults_meet_requests_and_lines_of_watches() {
    let api = server();
    let pods = |injected: Injected| {
        api.faults().inject(injected.path("/api/v1/pods").times(1));
    };
    pods(Injected::refuse(429, "TooManyRequests"));
    let refused = get(&api, "/api/v1/pods", "");
    assert_eq!(refused.status, 429);
    assert!(refused.body.contains("\"kind\":\"Status\""), "{}", refused.body);
    assert_eq!(get(&api, "/api/v1/namespaces", "").status, 200);
    let path = "/api/v1/pods?watch=true&resourceVersion=1000";
    api.apply_pod(&pod("a", "n1"));
    pods(Injected::edit(|line| line.replace("ADDED", "ODD")).field("watch", "true"));
    let (_, mut events) = watch(&api, path);
    assert_eq!(events.facts().0, "ODD");
    pods(Injected::cut());
    let (_, WatchStream(mut half)) = watch(&api, path);
    let line = wire::chunk(&mut half).unwrap().unwrap();
    assert!(line.starts_with(b"{") && !line.ends_with(b"}\n"));
    assert_eq!(wire::chunk(&mut half).unwrap(), None);
}

fn send(api: &Kubernetes, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let mut stream = TcpStream::connect(api.address()).unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let reply = wire::exchange(&mut stream, &request).unwrap();
    (reply.status, serde_json::from_str(&reply.body).unwrap())
}

#[test]
fn service_accounts_are_listed_watched_and_read() {
    let api = server();
    let account = ServiceAccountRecord::new("shop", "orders");
    let from = api.apply_service_account(&account);
    let role = ("eks.amazonaws.com/role-arn", "arn:aws:iam::1:role/orders");
    api.apply_service_account(&account.annotation(role.0, role.1));
    let path = format!("/api/v1/serviceaccounts?watch=true&resourceVersion={from}");
    assert_eq!(watch(&api, &path).1.facts().0, "MODIFIED");
    let listed = list(&api, "/api/v1/serviceaccounts");
    assert_eq!(listed["kind"], "ServiceAccountList");
    assert_eq!(listed["items"][0]["metadata"]["annotations"][role.0], role.1);
    assert_eq!(
        (api.lists(Resource::ServiceAccounts), api.watches(Resource::ServiceAccounts)),
        (1, 1)
    );
    let path = "/api/v1/namespaces/shop/serviceaccounts/orders";
    assert_eq!(list(&api, path)["metadata"]["name"], "orders");
    api.delete_service_account("shop", "orders");
    assert_eq!(get(&api, path, "").status, 404);
}

#[test]
fn a_token_is_of_the_pod_it_is_bound_to() {
    let api = server();
    let path = "/api/v1/namespaces/shop/serviceaccounts/default/token";
    let reference = |name: &str, uid: &str| json!({ "kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid });
    let request = |reference: Value| {
        json!({ "spec": {
            "audiences": ["sts.amazonaws.com"], "expirationSeconds": 600, "boundObjectRef": reference,
        }})
    };
    let good = request(reference("a", "uid-a"));
    assert_eq!(send(&api, "POST", path, &good).0, 404, "no ServiceAccount");
    api.apply_service_account(&ServiceAccountRecord::new("shop", "default"));
    assert_eq!(send(&api, "POST", path, &good).0, 404, "no pod");
    api.apply_pod(&pod("a", "n1"));
    let mut other = pod("b", "n1");
    other.service_account = "b".to_owned();
    api.apply_pod(&other);
    let (status, answer) = send(&api, "POST", path, &good);
    assert_eq!(status, 201, "{answer}");
    assert!(answer["status"]["expirationTimestamp"].is_string(), "{answer}");
    let token = answer["status"]["token"].as_str().unwrap();
    let claims = crate::fake::web_token::claims(token).unwrap();
    assert_eq!(claims["sub"], "system:serviceaccount:shop:default");
    assert_eq!(claims["aud"], json!(["sts.amazonaws.com"]));
    assert_eq!(claims["kubernetes.io"]["pod"], json!({ "name": "a", "uid": "uid-a" }));
    for (request, status) in [
        (request(reference("a", "uid-of-another")), 409),
        (request(reference("b", "uid-b")), 400),
        (request(json!({ "kind": "Secret", "apiVersion": "v1", "name": "a" })), 400),
        (json!({ "spec": { "expirationSeconds": 599 } }), 422),
    ] {
        assert_eq!(send(&api, "POST", path, &request).0, status, "{request}");
    }
    let asked = api.seen().into_iter().filter(|seen| seen.path == path && seen.body == good);
    assert_eq!(asked.count(), 3);
}

#[test]
fn events_are_checked_kept_and_counted_on() {
    let api = server();
    let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
    let event = json!({
        "metadata": { "name": "orders.1" }, "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Warning", "reason": "RoleForbidden", "action": "Authorise", "note": "no",
        "reportingController": "kiam-agent", "reportingInstance": "n1",
        "regarding": { "kind": "Pod", "apiVersion": "v1", "namespace": "shop", "name": "orders" },
    });
    assert_eq!(send(&api, "POST", path, &event).0, 201);
    assert_eq!(send(&api, "POST", path, &event).0, 409);
    for field in
        ["eventTime", "type", "reason", "action", "reportingController", "reportingInstance"]
    {
        let mut bad = event.clone();
        bad[field] = Value::Null;
        assert_eq!(send(&api, "POST", path, &bad).0, 422, "{field}");
    }
    let elsewhere = path.replace("shop", "other");
    assert_eq!(send(&api, "POST", &elsewhere, &event).0, 422);
    let one = format!("{path}/orders.1");
    let series =
        json!({ "series": { "count": 2, "lastObservedTime": "2026-01-01T00:01:00.000000Z" } });
    let (status, patched) = send(&api, "PATCH", &one, &series);
    assert_eq!((status, &patched["series"]["count"]), (200, &json!(2)));
    assert_eq!(send(&api, "PATCH", &one, &json!({ "note": "other" })).0, 422);
    assert_eq!(send(&api, "PATCH", &format!("{path}/none"), &series).0, 404);
    let events = api.events();
    assert_eq!((events.len(), &events[0]["note"]), (1, &json!("no")));
    assert_eq!(list(&api, path)["items"], json!(events));
}
