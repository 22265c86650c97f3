//! The whole agent without a kernel: the real binary on loopback, with source-IP identity, a small
//! Kubernetes API and a small STS over real HTTP.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use lab::{
    eventually,
    fake::{
        Injected,
        imds::NODE_ACCESS_KEY,
        kubernetes::{NamespaceRecord, PodRecord},
        sts::Sts,
    },
    loopback::{self, LoopbackNode, NODE_NAME},
    pod_client::wire::Reply,
};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const BASE: &str = "arn:aws:iam::123456789012:role/";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const UID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";

/// A pod on the agent's own loopback address.
fn pod(role: &str) -> PodRecord {
    PodRecord::scheduled("shop", "orders", UID, NODE_NAME)
        .role(role)
        .running(&["127.0.0.1".parse().unwrap()])
}

fn start(pod: &PodRecord, prepare: impl FnOnce(&Sts)) -> LoopbackNode {
    start_with(&[], pod, prepare)
}

fn start_with(flags: &[&str], pod: &PodRecord, prepare: impl FnOnce(&Sts)) -> LoopbackNode {
    let node = LoopbackNode::start(flags, |kubernetes, sts| {
        loopback::schedule(kubernetes, pod);
        prepare(sts);
    });
    node.unwrap()
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let Reply { status, body, .. } = loopback::get(address, path).unwrap();
    (status, body)
}

#[test]
fn counters_that_alerts_are_for_begin_at_zero() {
    let fixture = start(&pod("reader"), |_| ());
    let metrics = get(fixture.agent.admin(), "/metrics").1;
    for counter in [
        "kiam_credentials_issued_total{outcome=\"Retryable\"} 0\n",
        "kiam_credentials_issued_total{outcome=\"Throttled\"} 0\n",
        "kiam_imds_first_requests_total{found=\"Failed\"} 0\n",
    ] {
        assert!(metrics.contains(counter), "{counter} is missing from:\n{metrics}");
    }
}

#[test]
fn sessions_are_named_by_the_template() {
    let flags = ["--session-name={cluster}@{namespace}.{pod}", "--cluster-name=blue"];
    let fixture = start_with(&flags, &pod("reader"), |_| ());
    let issued = fixture.sts.issued();
    let [issued] = issued.as_slice() else { panic!("{issued:?}") };
    assert_eq!(
        (issued.session.as_str(), issued.role.clone()),
        ("blue@shop.orders", format!("{BASE}reader"))
    );
    // What names cost was logged once, and whoever logged it is done: that is no end of the agent.
    let mut fixture = fixture;
    assert!(fixture.agent.terminate().unwrap().success(), "it had ended by itself");
}

#[test]
fn credentials_are_there_before_the_first_request_and_no_request_asks_sts() {
    let fixture = start(&pod("reader"), |_| ());
    assert_eq!(get(fixture.agent.admin(), "/ready"), (200, "ready\n".to_owned()));
    assert_eq!(get(fixture.agent.pods(), LIST), (200, "reader".to_owned()));
    for _ in 0..1000 {
        let (status, body) = get(fixture.agent.pods(), &format!("{LIST}reader"));
        assert_eq!(status, 200, "{body}");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let owner = fixture.sts.owner(body["AccessKeyId"].as_str().unwrap()).unwrap();
        assert_eq!(
            (owner.role, owner.caller),
            (format!("{BASE}reader"), NODE_ACCESS_KEY.to_owned())
        );
    }
    assert_eq!(fixture.sts.requests(), 1);
    assert_eq!(get(fixture.agent.pods(), &format!("{LIST}writer")).0, 403);
    // Nor does the SDK ask 169.254.169.254 where it is.
    assert!(!fixture.agent.log().contains("load region"), "{}", fixture.agent.log());
}

#[test]
fn a_namespace_requires_session_tokens_by_annotation() {
    let fixture = start(&pod("reader"), |_| ());
    assert_eq!(get(fixture.agent.pods(), LIST), (200, "reader".to_owned()));
    let shop = NamespaceRecord::new("shop");
    let store = &fixture.kubernetes;
    store.apply_namespace(&shop.clone().annotation("iam.amazonaws.com/imdsv2", "required"));
    eventually("401 without a token", || get(fixture.agent.pods(), LIST) == (401, String::new()));
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\
               X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
    let answer = loopback::ask(fixture.agent.pods(), put.as_bytes()).unwrap();
    let token = answer.split_once("\r\n\r\n").unwrap().1;
    let with_token = format!(
        "GET {LIST} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\
         X-aws-ec2-metadata-token: {token}\r\n\r\n"
    );
    let answer = loopback::ask(fixture.agent.pods(), with_token.as_bytes()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("reader"), "{answer}");
    store.apply_namespace(&shop);
    eventually("200 again", || get(fixture.agent.pods(), LIST).0 == 200);
}

#[test]
fn changed_annotations_and_sts_faults_are_seen_and_survived() {
    let denied = Injected::refuse(403, "AccessDenied").field("RoleArn", &format!("{BASE}writer"));
    let fixture = start(&pod("reader"), |sts| {
        sts.faults().inject(denied);
    });
    assert_eq!(get(fixture.agent.pods(), LIST).1, "reader");
    fixture.kubernetes.apply_pod(&pod("writer"));
    eventually("404 for a role that STS denies", || get(fixture.agent.pods(), LIST).0 == 404);
    assert_eq!(get(fixture.agent.pods(), &format!("{LIST}writer")).0, 403);
    fixture.kubernetes.apply_pod(&pod("arn:aws:iam::broken"));
    eventually("404 for garbage", || get(fixture.agent.pods(), LIST).0 == 404);
    fixture.kubernetes.stop();
    fixture.sts.stop();
    assert_eq!(get(fixture.agent.pods(), LIST).0, 404);
    assert_eq!(get(fixture.agent.admin(), "/live").0, 200);
}

#[test]
fn while_the_watch_is_silent_for_too_long_what_is_held_is_served_and_not_renewed() {
    // Longer than the ten seconds before which nothing is renewed.
    let life = Duration::from_secs(14);
    let short = |sts: &Sts| sts.set_session_length(Some(life));
    let fixture = start_with(&["--max-staleness=3s"], &pod("reader"), short);
    fixture.kubernetes.cut_from_etcd(true);
    let stale = "kiam_credentials_waiting{reason=\"Stale\"} 1";
    eventually("a renewal that is kept back", || {
        get(fixture.agent.admin(), "/metrics").1.contains(stale)
    });
    let asked = fixture.sts.requests();
    assert_eq!(get(fixture.agent.pods(), LIST), (200, "reader".to_owned()));
    eventually("the end of what was held", || get(fixture.agent.pods(), LIST).0 == 503);
    let answer = loopback::get(fixture.agent.pods(), LIST).unwrap();
    assert!(answer.reason().contains("--max-staleness"), "the pod is told why: {answer:?}");
    assert_eq!(fixture.sts.requests(), asked);
    fixture.kubernetes.cut_from_etcd(false);
    eventually("credentials again", || {
        get(fixture.agent.pods(), LIST) == (200, "reader".to_owned())
    });
    assert!(fixture.sts.requests() > asked);
}

#[test]
fn an_annotation_loop_does_not_drain_sts() {
    let fixture = start(&pod("reader"), |_| ());
    let store = &fixture.kubernetes;
    for n in 0..200 {
        store.apply_pod(
            &pod("reader").annotation("iam.amazonaws.com/external-id", &format!("id-{n}")),
        );
        store.apply_pod(
            &pod("reader").annotation("iam.amazonaws.com/session-name", &format!("s{n}")),
        );
    }
    eventually("a reason", || {
        let answer = loopback::get(fixture.agent.pods(), LIST).unwrap();
        answer.status == 503 && answer.reason().contains("too often")
    });
    let kept = "kiam_credentials_waiting{reason=\"Pod\"} 1";
    assert!(get(fixture.agent.admin(), "/metrics").1.contains(kept));
    assert!(fixture.sts.requests() <= 5, "{} calls", fixture.sts.requests());
    // What was held before costs nothing, as it lingers.
    store.apply_pod(&pod("reader"));
    eventually("the first role again", || get(fixture.agent.pods(), LIST).0 == 200);
}

#[test]
fn operators_see_pods_without_secrets() {
    let fixture = start(&pod("reader"), |_| ());
    let output = status(fixture.agent.folder());
    assert!(output.status.success(), "{output:?}");
    let (code, metrics) = get(fixture.agent.admin(), "/metrics");
    assert_eq!(code, 200);
    assert!(metrics.contains("kiam_credentials_held{state=\"ready\"} 1"), "{metrics}");
    assert_eq!(get(fixture.agent.admin(), "/pods").0, 404, "not over TCP");
}

#[test]
fn operators_see_the_state_of_the_node() {
    let denied = Injected::refuse(403, "AccessDenied").field("RoleArn", &format!("{BASE}denied"));
    let fixture = start(&pod("denied"), |sts| drop(sts.faults().inject(denied)));
    let page = |words: &[&str]| {
        let output = ask(fixture.agent.folder(), words);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    eventually("the denial", || page(&["status"]).1.contains("1 failing"));
    let (code, text) = page(&["status"]);
    assert_eq!(code, Some(0), "{text}");
    for line in [
        "ready\nagent           kiam-agent ",
        "node            n1\n",
        "interception    off\n",
        "credentials     0 ready, 0 pending, 1 failing\n",
        "  failing       arn:aws:iam::123456789012:role/denied: STS: AccessDenied",
        "pods            1 known, 0 served, 1 without credentials; by path: node 1\n",
        "Credentials not issued: ",
    ] {
        assert!(text.contains(line), "{line:?} is missing from\n{text}");
    }
    let (code, json) = page(&["status", "--output=json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["node"], &json["ready"]), (Some(0), &"n1".into(), &true.into()));
    let arguments = json["arguments"].as_array().unwrap();
    assert!(arguments.contains(&"--node-name=n1".into()), "{arguments:?}");
    // What probes print has nothing that grows with the node.
    assert_eq!(page(&["status", "--ready"]), (Some(0), "ready\n".to_owned()));
    assert_eq!(page(&["status", "--live"]), (Some(0), "live\n".to_owned()));
    let (code, json) = page(&["explain", "shop/orders", "--output=json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (code, &json["served"], &json["pods"][0]["name"]),
        (Some(1), &false.into(), &"orders".into())
    );
    let (code, pods) = page(&["pods"]);
    let pods: serde_json::Value = serde_json::from_str(&pods).unwrap();
    assert_eq!((code, &pods[0]["served"]), (Some(0), &false.into()));
}

fn status(folder: &Path) -> Output {
    ask(folder, &["status"])
}

/// What a subcommand says of the agent that runs.
fn ask(folder: &Path, words: &[&str]) -> Output {
    let state = format!("--state-dir={}", folder.join("state").display());
    Command::new(AGENT).args(words).arg(state).env_clear().output().unwrap()
}

/// Whether the pod would get credentials, and why.
fn explain(fixture: &LoopbackNode, pod: &str) -> (bool, String) {
    let output = ask(fixture.agent.folder(), &["explain", pod]);
    assert!(output.stderr.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    (output.status.success(), text)
}

#[test]
fn explain_says_what_a_pod_gets_and_why_and_so_do_events() {
    let denied = Injected::refuse(403, "AccessDenied").field("RoleArn", &format!("{BASE}denied"));
    let prepare = |sts: &Sts| {
        sts.faults().inject(denied);
    };
    let reader = pod("reader").annotation("iam.amazonaws.com/external-id", "hunter2");
    let fixture = start(&reader, prepare);
    let store = &fixture.kubernetes;
    let shop = NamespaceRecord::new("shop");
    let shop = |permitted: &str| {
        let shop = shop.clone().annotation("iam.amazonaws.com/permitted", permitted);
        store.apply_namespace(
            &shop.annotation("iam.amazonaws.com/allowed-roles", "[\"reader\", \"de*\"]"),
        );
    };
    shop(".*");
    let until = |granted: bool, parts: &[&str]| {
        eventually(&format!("{parts:?}"), || {
            let (is, text) = explain(&fixture, "shop/orders");
            assert!(!text.contains("hunter2"), "{text}");
            is == granted && parts.iter().all(|part| text.contains(part))
        });
    };
    until(true, &["allows the role by \"reader\"", "external id     set", "200, with these"]);
    store.apply_pod(&pod("writer"));
    until(false, &["forbids the role: ", "404 for its role, 403 for credentials"]);
    store.apply_pod(&pod("denied"));
    until(false, &["none: STS: AccessDenied", "asked again in", "404 for its role, 403 for"]);
    shop("(");
    until(false, &["permitted       forbids every role: \"(\" is no regular expression"]);
    let (granted, text) = explain(&fixture, "shop/order");
    assert!(!granted && text.contains("node n1") && text.contains("alike: shop/orders"), "{text}");
    let output = ask(fixture.agent.folder(), &["explain", "orders"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    eventually("Events of all of it", || {
        let events = store.events();
        let has = |reason: &str, note: &str| {
            events.iter().any(|event| {
                event["reason"] == *reason && event["note"].as_str().unwrap().contains(note)
            })
        };
        has("InvalidPermitted", "no regular expression") && has("RoleForbidden", "shop")
    });
}

#[test]
fn wrong_command_line_tells_every_mistake_and_exits_64() {
    let output = Command::new(AGENT)
        .args(["--port=x", "--hold=y", "--nonsense"])
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8(output.stderr).unwrap();
    for flag in ["--port", "--hold", "--nonsense", "--host", "--role-base-arn"] {
        assert!(text.contains(flag), "{flag} is missing from:\n{text}");
    }
}
