//! What pods receive over real sockets.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, sleep, timeout},
};

use super::{
    Config, Imdsv2,
    fixture::{EXTENDED, Identity, LIST, Node, Reply, body_of, config, namespace, pod, uid},
};
use crate::imds::ErrorKind;
use kiam_core::{pods::Pod, telemetry::captured::CapturedLogs};

/// The statuses of all answers in `text`.
pub(super) fn statuses(text: &str) -> Vec<&str> {
    text.match_indices("HTTP/1.1 ").map(|(at, _)| &text[at + 9..at + 12]).collect()
}

#[tokio::test]
async fn pod_gets_its_own_role_byte_for_byte() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let list = node
        .raw(
            2,
            format!("GET {LIST} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
                .as_bytes(),
        )
        .await;
    let (head, body) = list.split_once("\r\n\r\n").unwrap();
    assert_eq!(body, "reader", "no newline, no space");
    let mut lines: Vec<_> = head.lines().map(str::to_ascii_lowercase).collect();
    lines.retain(|line| !line.starts_with("date: "));
    lines.sort();
    assert_eq!(
        lines,
        [
            "connection: close",
            "content-length: 6",
            "content-type: text/plain",
            "http/1.1 200 ok",
            "server: ec2ws"
        ]
    );
    let plain = body_of("reader");
    let extended = plain.replace('}', r#","AccountId":"123456789012"}"#);
    for (path, expected) in [
        (LIST.trim_end_matches('/').to_owned(), "reader"),
        (EXTENDED.to_owned(), "reader"),
        (format!("{LIST}reader"), &plain),
        (format!("{LIST}/reader"), &plain),
        (format!("{LIST}reader/"), &plain),
        (format!("{EXTENDED}reader/"), &extended),
        (format!("/{LIST}/reader//").replace("meta-data/", "meta-data//"), &plain),
        (format!("{LIST}arn:aws:iam::123456789012:role/reader"), &plain),
        (format!("{EXTENDED}reader"), &extended),
        (format!("/1.0/{}reader", &LIST["/latest/".len()..]), &plain),
        ("/".to_owned(), "latest"),
        ("/latest/meta-data/iam/".to_owned(), "info\nsecurity-credentials/"),
    ] {
        let reply = node.get(2, &path).await;
        assert_eq!((reply.status, reply.body.as_str()), (200, expected), "{path}");
    }
    assert_eq!(node.get(3, LIST).await.body, "writer");
    for role in ["writer", "team/writer", "arn:aws:iam::123456789012:role/team/writer"] {
        assert_eq!(node.get(3, &format!("{LIST}{role}")).await.body, body_of("writer"), "{role}");
    }
    let info = node.get(3, "/latest/meta-data/iam/info").await.body;
    assert!(info.contains("123456789012:instance-profile/team/writer\""), "{info}");
}

#[tokio::test]
async fn a_role_that_was_the_pods_is_404_and_one_that_never_was_403() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let status = async |role: &str| node.get(2, &format!("{LIST}{role}")).await.status;
    assert_eq!((status("reader").await, status("writer").await), (200, 403));
    for (version, role) in (10..).zip(["team/writer", "slow"]) {
        node.index.apply(Pod { resource_version: Some(version), ..pod(2, Some(role)) });
    }
    // The list has the new one, so that who lists again after the 404 goes on with that.
    assert_eq!(node.get(2, LIST).await.body, "slow");
    for former in ["reader", "arn:aws:iam::123456789012:role/reader", "writer", "team/writer"] {
        assert_eq!(status(former).await, 404, "{former}");
    }
    for never in ["other", "team/reader", "arn:aws:iam::999999999999:role/reader"] {
        assert_eq!(status(never).await, 403, "{never}");
    }
    assert_eq!(status("slow").await, 200);
    // Another pod's past is nothing to it, and neither is that of a pod that is gone.
    assert_eq!(node.get(3, &format!("{LIST}reader")).await.status, 403);
    node.index.delete(&Pod::test(2));
    assert_eq!(status("reader").await, 403);
}

/// (pod, path, status, part of the reason)
const REFUSALS: [(u8, &str, u16, &str); 21] = [
    // No role.
    (4, "", 404, "no annotation"),
    (4, "reader", 403, "no annotation"),
    // Another pod's role, in every form.
    (2, "writer", 403, "not the pod's"),
    (2, "team/reader", 403, "not the pod's"),
    (2, "Reader", 403, "not the pod's"),
    (2, "arn:aws:iam::999999999999:role/reader", 403, "not the pod's"),
    (3, "reader", 403, "not the pod's"),
    // Forbidden by the namespace.
    (7, "", 404, "namespace"),
    (7, "reader", 403, "namespace"),
    // A role that is none.
    (8, "", 404, "iam.amazonaws.com/role"),
    // AWS says no.
    (5, "", 404, "AccessDenied"),
    (5, "denied", 403, "AccessDenied"),
    // AWS says nothing.
    (6, "", 503, "no credentials yet"),
    (6, "never", 503, "no credentials yet"),
    // Not known.
    (9, "", 404, "pod"),
    (9, "reader", 403, "pod"),
    // Not attested.
    (66, "", 403, "kernel"),
    (66, "reader", 403, "kernel"),
    // Not a path.
    (2, "%72eader", 404, "path not allowed"),
    (2, "../info", 404, "path not allowed"),
    (2, "./reader", 404, "path not allowed"),
];

#[tokio::test]
async fn refusals_have_an_empty_body_and_a_reason() {
    let node = Node::usual(config(), Identity::Kernel).await;
    for (n, rest, status, reason) in REFUSALS {
        for list in [LIST, EXTENDED] {
            let reply = node.get(n, &format!("{list}{rest}")).await;
            let shown = reply.header("x-kiam-reason").unwrap_or_default();
            assert_eq!((reply.status, reply.body.as_str()), (status, ""), "{n} {rest}: {reply:?}");
            assert!(shown.contains(reason), "{n} {rest}: {shown}");
            assert_eq!(reply.header("content-length"), Some("0"));
            assert_eq!(reply.header("content-type"), Some("text/plain"));
            // STS is asked again for 5 in a quarter of a minute: nobody is to wait for that.
            assert_eq!(reply.header("retry-after"), (n == 6).then_some("1"), "{reply:?}");
        }
    }
    let metrics = node.metrics();
    for line in [
        "kiam_imds_requests_total{route=\"RoleName\",status=\"404\"}",
        "kiam_imds_requests_total{route=\"Credentials\",status=\"403\"}",
        "kiam_imds_refusals_total{reason=\"OtherRole\"}",
        "kiam_imds_refusals_total{reason=\"Unattested\"}",
        "kiam_imds_v1_requests_total",
        "kiam_imds_request_duration_seconds_count",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn address_that_is_not_the_pods_is_refused() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let mut moved = pod(2, Some("reader"));
    moved.addresses = vec!["10.0.0.2".parse().unwrap()];
    moved.resource_version = Some(2);
    node.index.apply(moved);
    for path in
        [LIST.to_owned(), format!("{LIST}reader"), "/latest/meta-data/instance-id".to_owned()]
    {
        assert_eq!(node.get(2, &path).await.status, 403, "{path}");
    }
}

#[tokio::test]
async fn address_of_two_live_pods_is_refused_in_source_ip_mode() {
    let node = Node::usual(config(), Identity::SourceIp).await;
    let mut successor = pod(9, Some("team/writer"));
    successor.addresses = vec!["127.0.0.2".parse().unwrap()];
    node.index.apply(successor);
    assert_eq!(node.get(2, LIST).await.status, 403);
    assert_eq!(node.get(2, &format!("{LIST}reader")).await.status, 403);
}

#[tokio::test]
async fn every_request_of_a_connection_is_authorised_anew() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let mut stream = node.connect(2).await;
    let mut ask = async || Reply::to(&mut stream, &format!("{LIST}reader")).await.status;
    assert_eq!(ask().await, 200);
    node.index.apply({
        let mut closed = namespace("default", Some("nothing"));
        closed.resource_version = Some(2);
        closed
    });
    assert_eq!(ask().await, 403);
    node.index.apply({
        let mut open = namespace("default", None);
        open.resource_version = Some(3);
        open
    });
    assert_eq!(ask().await, 200);
    node.index.delete(&pod(2, None));
    assert_eq!(ask().await, 403);
}

#[tokio::test]
async fn expired_credentials_are_never_served() {
    let node = Node::usual(config(), Identity::Kernel).await;
    node.clock.step(7200);
    assert_eq!(node.get(2, LIST).await.status, 503);
    assert_eq!(node.get(2, &format!("{LIST}reader")).await.status, 503);
}

#[tokio::test]
async fn request_is_held_for_a_pod_its_namespace_and_its_credentials() {
    let patient = Config { hold: Duration::from_secs(30), ..config() };
    let node = Node::start(patient, Identity::Kernel).await;
    let later = async {
        sleep(Duration::from_millis(40)).await;
        node.index.apply(pod(2, Some("slow")));
        sleep(Duration::from_millis(40)).await;
        node.index.apply(namespace("default", None));
    };
    let (reply, ()) = tokio::join!(node.get(2, LIST), later);
    assert_eq!((reply.status, reply.body.as_str()), (200, "slow"));
}

#[tokio::test]
async fn first_request_of_each_pod_is_counted_by_how_it_found_its_credentials() {
    let node = Node::start(config(), Identity::Kernel).await;
    node.index.apply(namespace("default", None));
    // The second has the role of the first; the third's is not given.
    for (n, role, status) in [(2, "slow", 200), (3, "slow", 200), (5, "denied", 404)] {
        node.index.apply(pod(n, Some(role)));
        for _ in 0..3 {
            assert_eq!(node.get(n, LIST).await.status, status, "{role}");
        }
    }
    let metrics = node.metrics();
    for found in ["Waited", "Ready", "Failed"] {
        let line = format!("kiam_imds_first_requests_total{{found=\"{found}\"}} 1\n");
        assert!(metrics.contains(&line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn hold_is_one_deadline_for_pod_and_credentials() {
    let node = Node::start(config(), Identity::Kernel).await;
    node.index.apply(namespace("default", None));
    let later = async {
        sleep(Duration::from_millis(200)).await;
        node.index.apply(pod(2, Some("never")));
    };
    let began = Instant::now();
    let (reply, ()) = tokio::join!(node.get(2, LIST), later);
    assert_eq!(reply.status, 503);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(290), "{took:?}");
    assert!(took < Duration::from_millis(450), "{took:?}");
}

#[tokio::test]
async fn role_that_changes_during_the_hold_is_the_new_one() {
    let node = Node::start(config(), Identity::Kernel).await;
    node.index.apply(namespace("default", None));
    node.index.apply(pod(2, Some("slow")));
    let later = async {
        sleep(Duration::from_millis(50)).await;
        let mut changed = pod(2, Some("reader"));
        changed.resource_version = Some(2);
        node.index.apply(changed);
    };
    let (reply, ()) = tokio::join!(node.get(2, LIST), later);
    assert_eq!(reply.body, "reader");
}

#[tokio::test]
async fn tokens_are_issued_in_every_framing_that_clients_use() {
    let node = Node::start(config(), Identity::Kernel).await;
    let ttl = "x-AWS-ec2-Metadata-TOKEN-ttl-seconds: 21600\r\n";
    for framing in [
        "",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0\r\n",
        "Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n0\r\n",
    ] {
        let began = Instant::now();
        let request = format!(
            "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n{ttl}{framing}\r\n"
        );
        let text = node.raw(2, request.as_bytes()).await;
        let text = text.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&text);
        let reply = Reply::parse(text);
        assert_eq!(reply.status, 200, "{framing:?} {reply:?}");
        assert_eq!(reply.header("x-aws-ec2-metadata-token-ttl-seconds"), Some("21600"));
        assert_eq!(reply.header("content-type"), Some("text/plain"));
        assert!(reply.body.len() > 40 && reply.body.bytes().all(|b| b.is_ascii_graphic()));
        // No pod is known here: it is never held.
        assert!(began.elapsed() < Duration::from_millis(200));
    }
}

#[tokio::test]
async fn bad_token_requests_are_refused_as_ec2_does() {
    let node = Node::start(config(), Identity::Kernel).await;
    let good = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    for (line, headers, status) in [
        ("PUT /latest/api/token", "", 400),
        ("PUT /latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 0\r\n", 400),
        ("PUT /latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 21601\r\n", 400),
        ("PUT /latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: \r\n", 400),
        ("PUT /latest/api/token", &good.repeat(2), 400),
        ("PUT /latest/api/token", &format!("{good}X-Forwarded-For: 10.0.0.1\r\n"), 403),
        ("PUT /2021-03-23/api/token", good, 403),
        ("PUT /latest/api/token", &format!("{good}Forwarded: for=10.0.0.1\r\n"), 403),
        ("PUT /latest/api/token", &format!("{good}Via: 1.1 proxy\r\n"), 403),
        ("PUT /latest/api/.//token", good, 404),
        ("GET /latest/api/token", "", 405),
        ("PUT /latest/meta-data/", good, 405),
        ("POST /latest/api/token", good, 405),
    ] {
        let reply = node.send(2, line, headers).await;
        assert_eq!((reply.status, reply.body.as_str()), (status, ""), "{line} {headers}");
    }
}

#[tokio::test]
async fn bodies_are_refused_and_the_connection_closed() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let smuggled = format!("GET {LIST} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let length = smuggled.len();
    let chunked = format!("{length:x}\r\n{smuggled}\r\n0\r\n\r\n");
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    for (line, headers, body) in [
        ("GET /latest/", format!("Content-Length: {length}\r\n"), smuggled.clone()),
        ("HEAD /latest/", format!("Content-Length: {length}\r\n"), smuggled.clone()),
        ("GET /latest/", "Transfer-Encoding: chunked\r\n".to_owned(), chunked.clone()),
        ("GET /latest/", "Transfer-Encoding: chunked\r\n".to_owned(), "0\r\n\r\n".to_owned()),
        ("PUT /latest/api/token", format!("{ttl}Content-Length: {length}\r\n"), smuggled.clone()),
        ("PUT /latest/api/token", format!("{ttl}Transfer-Encoding: chunked\r\n"), chunked.clone()),
        // Two lengths: the body would be one thing to one reader and another to the next.
        (
            "GET /latest/",
            format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
            chunked,
        ),
        // Nobody is told to go on with a body that is refused.
        (
            "GET /latest/",
            format!("Content-Length: {length}\r\nExpect: 100-continue\r\n"),
            String::new(),
        ),
        (
            "PUT /latest/api/token",
            format!("{ttl}Content-Length: 5\r\nExpect: 100-continue\r\n"),
            String::new(),
        ),
    ] {
        // No `Connection: close` is asked for: the agent closes by itself.
        let request = format!("{line} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n{body}");
        let text = node.raw(2, request.as_bytes()).await;
        let reply = Reply::parse(&text);
        assert_eq!((reply.status, reply.body.as_str()), (400, ""), "{line} {headers} {text}");
        assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{text}");
    }
}

#[tokio::test]
async fn tokens_are_checked_in_both_modes() {
    for imdsv2 in [Imdsv2::Optional, Imdsv2::Required] {
        let node = Node::usual_with_tokens(imdsv2).await;
        let own = node.token(2, 60).await;
        let others = node.token(3, 60).await;
        let list = format!("GET {LIST}");
        let without = if imdsv2 == Imdsv2::Required { 401 } else { 200 };
        let header = |token: &str| format!("X-aws-ec2-metadata-token: {token}\r\n");
        for (headers, status) in [
            (String::new(), without),
            (header(&own), 200),
            (header(&own).to_uppercase().replace(&own.to_uppercase(), &own), 200),
            (header(&others), 401),
            (header(""), 401),
            (header("nonsense"), 401),
            (header(&own[1..]), 401),
            (header(&format!("{own}A")), 401),
            (header(&own).repeat(2), 401),
        ] {
            let reply = node.send(2, &list, &headers).await;
            assert_eq!((reply.status, reply.body.is_empty()), (status, status != 200), "{headers}");
        }
        for path in ["/", "/latest/meta-data/placement/region", "/latest/user-data"] {
            let reply = node.send(2, &format!("GET {path}"), &header(&others)).await;
            assert_eq!(reply.status, 401, "{path}");
        }
    }
}

/// A GET without token, but with a name.
const PROGRAM: &str = "User-Agent: Boto/2.49\r\n";

#[tokio::test]
async fn tokens_are_required_where_the_namespace_says_so() {
    let captured = CapturedLogs::start(tracing::Level::INFO);
    let node = Node::usual(config(), Identity::Kernel).await;
    let token = format!("X-aws-ec2-metadata-token: {}\r\n", node.token(2, 60).await);
    let mut namespace = namespace("default", None);
    let paths = [LIST, "/", "/latest/meta-data/placement/region", "/latest/meta-data/iam/info"];
    for (version, imdsv2, without) in [
        (2, Some("required"), 401),
        (3, Some("optional"), 200),
        (4, Some("reqired"), 401),
        (5, None, 200),
    ] {
        namespace.imdsv2 = imdsv2.map(Into::into);
        namespace.resource_version = Some(version);
        node.index.apply(namespace.clone());
        for path in paths {
            let reply = node.send(2, &format!("GET {path}"), PROGRAM).await;
            assert_eq!(reply.status, without, "{imdsv2:?} {path}");
            let reply = node.send(2, &format!("GET {path}"), &token).await;
            assert_eq!(reply.status, 200, "{imdsv2:?} {path}");
        }
    }
    // Only those that were accepted are counted, and each program is told of once.
    let metrics = node.metrics();
    assert!(metrics.contains("kiam_imds_v1_requests_total 10\n"), "{metrics}");
    let lines = captured.lines_with("user_agent=\"Boto/2.49\"");
    assert!(lines.len() == 1 && lines[0].contains("pod-2"), "{lines:?}");
}

#[tokio::test]
async fn a_token_that_is_required_during_the_hold_is_required_of_the_answer() {
    let node = Node::start(config(), Identity::Kernel).await;
    node.index.apply(namespace("default", None));
    node.index.apply(pod(2, Some("slow")));
    let token = format!("X-aws-ec2-metadata-token: {}\r\n", node.token(2, 60).await);
    let path = format!("{LIST}slow");
    let later = async {
        sleep(Duration::from_millis(50)).await;
        let mut required = namespace("default", None);
        required.resource_version = Some(2);
        required.imdsv2 = Some("required".into());
        node.index.apply(required);
    };
    let asked = format!("GET {path}");
    let with_token = node.send(2, &asked, &token);
    let (without, with, ()) = tokio::join!(node.get(2, &path), with_token, later);
    assert_eq!((without.status, with.status), (401, 200), "{without:?}");
    let metrics = node.metrics();
    assert!(metrics.contains("kiam_imds_v1_requests_total 1\n"), "it asked without one: {metrics}");
}

#[tokio::test]
async fn a_namespace_that_is_not_known_is_waited_for_and_may_require_tokens() {
    let node = Node::start(config(), Identity::Kernel).await;
    node.index.apply(pod(2, Some("reader")));
    let region = "/latest/meta-data/placement/region";
    let token = format!("X-aws-ec2-metadata-token: {}\r\n", node.token(2, 60).await);
    assert_eq!(node.get(2, region).await.status, 401);
    assert_eq!(node.send(2, &format!("GET {region}"), &token).await.status, 200);
    let later = async {
        sleep(Duration::from_millis(40)).await;
        node.index.apply(namespace("default", None));
    };
    let (reply, ()) = tokio::join!(node.get(2, region), later);
    assert_eq!(reply.status, 200);
}

fn node_role() -> Config {
    Config { node_roles: vec!["default/node".parse().unwrap()], ..config() }
}

#[tokio::test]
async fn pods_of_a_node_role_are_passed_on_and_no_others() {
    let captured = CapturedLogs::start(tracing::Level::INFO);
    let node = Node::usual(node_role(), Identity::Kernel).await;
    let mut own = pod(10, Some("reader"));
    "node".clone_into(&mut own.service_account);
    let mut other_namespace = own.clone();
    other_namespace.namespace = "strict".to_owned();
    other_namespace.uid = uid(11);
    other_namespace.addresses = vec!["127.0.0.11".parse().unwrap()];
    node.index.apply(own.clone());
    node.index.apply(other_namespace);
    // What the agent would refuse: it goes out byte for byte.
    let request = "GET /latest/%75ser-data?x HTTP/1.1\r\nhOST: evil.example\r\nX-Forwarded-For: 1.2.3.4\r\nConnection: close\r\nx-aws-ec2-metadata-token: node-token\r\n\r\n";
    let answer = node.raw(10, request.as_bytes()).await;
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    assert_eq!(Reply::parse(&answer).body, "node:/latest/%75ser-data?x");
    assert_eq!(node.imds.heard().last().map(String::as_str), Some(request));
    let heard = node.imds.heard().len();
    for n in [2, 11, 9, 66] {
        let status = Reply::parse(&node.raw(n, request.as_bytes()).await).status;
        assert!([403, 404].contains(&status), "{n}: {status}");
    }
    // Its address alone is no proof.
    own.addresses = vec!["10.0.0.10".parse().unwrap()];
    own.resource_version = Some(2);
    node.index.apply(own);
    assert_eq!(Reply::parse(&node.raw(10, request.as_bytes()).await).status, 403);
    assert_eq!(node.imds.heard().len(), heard, "{:?}", node.imds.heard());
    assert_eq!(captured.lines_with("--node-role").len(), 1);
}

#[tokio::test]
async fn a_pod_of_a_node_role_is_waited_for() {
    let node = Node::start(node_role(), Identity::Kernel).await;
    let later = async {
        sleep(Duration::from_millis(40)).await;
        let mut own = pod(10, None);
        "node".clone_into(&mut own.service_account);
        node.index.apply(own);
    };
    let request = b"PUT /latest/api/token HTTP/1.1\r\n\r\n";
    let (answer, ()) = tokio::join!(node.raw(10, request), later);
    assert_eq!(Reply::parse(&answer).body, "node-token");
    // One hold, not two, and then the answer that an unknown pod has; nothing is kept open for it.
    let began = Instant::now();
    let get = format!("GET {LIST} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let answer = node.raw(9, get.as_bytes()).await;
    assert_eq!(Reply::parse(&answer).status, 404);
    assert!(began.elapsed() < Duration::from_millis(550), "{:?}", began.elapsed());
    // A token is never refused: SDKs would fall back to IMDSv1 and stay there.
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
    let reply = Reply::parse(&node.raw(9, put.as_bytes()).await);
    assert_eq!((reply.status, reply.header("connection")), (200, Some("close")), "{reply:?}");
    node.index.apply(namespace("default", None));
    node.index.apply(pod(9, Some("reader")));
    let header = format!("X-aws-ec2-metadata-token: {}\r\n", reply.body);
    assert_eq!(node.send(9, &format!("GET {LIST}"), &header).await.body, "reader");
}

#[tokio::test]
async fn an_address_is_not_believed_when_the_watch_is_silent_for_90_s() {
    let node = Node::usual(config(), Identity::SourceIp).await;
    let silent = async |time: Duration| {
        tokio::time::pause();
        tokio::time::advance(time).await;
        tokio::time::resume();
    };
    node.index.heard::<Pod>();
    silent(Duration::from_secs(85)).await;
    let mut kept = node.connect(2).await;
    for _ in 0..2 {
        assert_eq!(Reply::to(&mut kept, LIST).await.status, 200);
    }
    silent(Duration::from_secs(5)).await;
    assert_eq!(Reply::to(&mut kept, LIST).await.status, 403, "no record has changed");
    for path in [LIST.to_owned(), format!("{LIST}reader")] {
        let reply = node.get(2, &path).await;
        assert_eq!((reply.status, reply.body.as_str()), (403, ""), "{reply:?}");
        assert!(reply.header("x-kiam-reason").unwrap().contains("stale"), "{reply:?}");
    }
    // Nor when that is so by the time that its credentials come.
    node.index.heard::<Pod>();
    silent(Duration::from_millis(89_900)).await;
    node.index.apply(pod(12, Some("slow")));
    let reply = node.get(12, &format!("{LIST}slow")).await;
    assert_eq!((reply.status, reply.body.as_str()), (403, ""), "{reply:?}");
    node.index.heard::<Pod>();
    assert_eq!(node.get(2, LIST).await.body, "reader");
}

#[tokio::test]
async fn a_flood_of_refusals_is_one_line_for_each_pod_and_reason() {
    let captured = CapturedLogs::start(tracing::Level::INFO);
    let node = Node::usual(config(), Identity::Kernel).await;
    let began = Instant::now();
    for _ in 0..50 {
        assert_eq!(node.get(2, "/latest/user-data").await.status, 404);
        assert_eq!(node.get(3, &format!("{LIST}writer")).await.status, 200);
    }
    assert_eq!(node.get(4, "/latest/user-data").await.status, 404);
    assert_eq!(node.get(2, &format!("{LIST}writer")).await.status, 403);
    let most = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    let refused = captured.lines_with("Rejected request");
    let of = |part: &str| refused.iter().filter(|line| line.contains(part)).count();
    assert!((1..=most + 1).contains(&of("path not allowed")), "{refused:#?}");
    assert_eq!(of("not the pod's"), 1, "{refused:#?}");
    let mut served = captured.lines_with("Processed request");
    served.retain(|line| line.contains("pod-3"));
    assert!((1..=most + 1).contains(&served.len()), "{served:#?}");
}

/// What is refused before the pod is looked up, and the part of the log line that says why.
const EARLY: [(&str, &str, &str); 7] = [
    ("GET /latest/user-data", "", "path not allowed"),
    ("GET /latest/%2e", "", "path not allowed"),
    ("GET /latest/meta-data/", "X-aws-ec2-metadata-token: x\r\n", "token is not valid"),
    ("PUT /latest/api/token", "", "must be 1 to 21600"),
    ("PUT /2021-03-23/api/token", "", "/latest/api/token only"),
    ("POST /latest/api/token", "", "method not allowed"),
    ("GET /latest/", "Via: 1.1 x\r\n", "a proxy forwards"),
];

#[tokio::test]
async fn every_refusal_names_the_pod_on_every_path_to_the_agent() {
    for identity in [Identity::PodListener, Identity::Kernel, Identity::SourceIp] {
        let captured = CapturedLogs::start(tracing::Level::DEBUG);
        let node = Node::usual(config(), identity).await;
        for (line, headers, reason) in EARLY {
            node.send(2, line, &format!("User-Agent: old/1\r\n{headers}")).await;
            let lines = captured.lines_with("Rejected request");
            let of: Vec<_> = lines.iter().filter(|line| line.contains(reason)).collect();
            assert!(!of.is_empty(), "{line}: {lines:#?}");
            for line in of {
                let named = line.contains("pod.name=\"pod-2\"")
                    && line.contains("pod.namespace=\"default\"")
                    && (identity == Identity::SourceIp
                        || line.contains(&format!("pod.uid={}", uid(2))));
                assert!(named, "{identity:?}: {line}");
            }
        }
        node.token(3, 60).await;
        let token = captured.lines_with("req.method=PUT").concat();
        assert!(token.contains("pod.name=\"pod-3\""), "{token}");
        // One that has no record has its UID, where the kernel attests it.
        if identity != Identity::SourceIp {
            node.get(9, "/latest/user-data").await;
            let unknown = captured.lines_with(&format!("pod.uid={}", uid(9))).concat();
            assert!(unknown.contains("Rejected request"), "{unknown}");
        }
        let page = node.journal.of(&uid(2));
        assert_eq!(page.refused.len(), EARLY.len(), "{page:#?}");
        assert!(page.refused.iter().all(|it| it.user_agent == "old/1" && it.reason.is_some()));
        assert_eq!(page.refused.last().map(|it| it.path.as_str()), Some("/latest/user-data"));
    }
}

#[tokio::test]
async fn calls_to_sts_are_logged_with_the_pod_that_they_are_for() {
    let captured = CapturedLogs::start(tracing::Level::INFO);
    let node = Node::usual(config(), Identity::Kernel).await;
    assert_eq!(node.get(5, LIST).await.status, 404);
    for (what, n) in [("Issued credentials", 2), ("Issued credentials", 3), ("not issued", 5)] {
        let lines = captured.lines_with(what);
        let named =
            format!("pod.name=\"pod-{n}\" pod.namespace=\"default\" pod.uid=\"{}\"", uid(n));
        assert!(lines.iter().any(|line| line.contains(&named)), "{named}: {lines:#?}");
    }
}

#[tokio::test]
async fn who_asks_without_a_token_is_remembered_by_pod_and_path() {
    let node = Node::usual(config(), Identity::Kernel).await;
    for _ in 0..3 {
        node.send(3, &format!("GET {LIST}"), PROGRAM).await;
    }
    node.send(3, "GET /latest/user-data", PROGRAM).await;
    let page = node.journal.of(&uid(3));
    let old: Vec<_> = page.imdsv1.iter().filter(|it| it.user_agent == "Boto/2.49").collect();
    assert!(matches!(old[..], [it] if it.count == 3 && it.path == LIST), "{page:#?}");
    assert_eq!((page.refused.len(), page.refused[0].reason), (1, Some(ErrorKind::Path)));
    assert!(node.journal.of(&uid(2)).refused.is_empty());
}

#[tokio::test]
async fn a_body_that_does_not_end_is_given_up() {
    let node = Node::start(config(), Identity::Kernel).await;
    let head = "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (rest, most) in [("", 1500), ("0", 1500), ("0\r\n", 1500), ("5\r\n", 1500), ("zz\r\n", 500)]
    {
        let began = Instant::now();
        let answer = node.raw(2, format!("{head}{rest}").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{rest:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(began.elapsed() < Duration::from_millis(most), "{rest:?}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn methods_hosts_and_proxies_are_refused() {
    let node = Node::usual(config(), Identity::Kernel).await;
    for method in ["POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"] {
        let reply = node.send(2, &format!("{method} {LIST}"), "").await;
        assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, HEAD")), "{method}");
    }
    for method in ["GET", "HEAD", "POST"] {
        let reply = node.send(2, &format!("{method} /latest/api/token"), "").await;
        assert_eq!((reply.status, reply.header("allow")), (405, Some("PUT")), "{method}");
    }
    for proxy in
        ["X-Forwarded-For: 1.2.3.4", "Forwarded: for=1.2.3.4;proto=http", "via: 1.0 fred", "Via:"]
    {
        for line in
            [format!("GET {LIST}"), format!("HEAD {LIST}"), "GET /latest/user-data".to_owned()]
        {
            let reply = node.send(2, &line, &format!("{proxy}\r\n")).await;
            assert_eq!(reply.status, 403, "{line} {proxy}");
        }
    }
    // A mesh adds many, none of which says that the request is another's.
    let many: String = (0..98).map(|n| format!("X-Trace-{n}: {n}\r\n")).collect();
    assert_eq!(node.send(2, &format!("GET {LIST}"), &many).await.body, "reader");
    let port = node.address.port();
    for (line, host, status) in [
        (LIST.to_owned(), "Host: 169.254.169.254\r\n".to_owned(), 200),
        (LIST.to_owned(), "host: 169.254.169.254:80\r\n".to_owned(), 200),
        (LIST.to_owned(), "HOST: [fd00:ec2::254]\r\n".to_owned(), 200),
        (LIST.to_owned(), "Host: instance-data.ec2.internal\r\n".to_owned(), 200),
        (LIST.to_owned(), "Host: instance-data.eu-west-1.compute.internal\r\n".to_owned(), 200),
        (LIST.to_owned(), "Host: evil.example\r\n".to_owned(), 403),
        (LIST.to_owned(), "Host:\r\n".to_owned(), 403),
        // In kernel mode the agent's own address is nobody's.
        (LIST.to_owned(), format!("Host: 127.0.0.1:{port}\r\n"), 403),
        (LIST.to_owned(), String::new(), 400),
        (LIST.to_owned(), "Host: 169.254.169.254\r\n".repeat(2), 400),
        (format!("http://169.254.169.254{LIST}"), "Host: 169.254.169.254\r\n".to_owned(), 200),
        (format!("http://evil.example{LIST}"), "Host: 169.254.169.254\r\n".to_owned(), 404),
        (format!("http://169.254.169.254{LIST}"), "Host: evil.example\r\n".to_owned(), 403),
        (format!("https://169.254.169.254{LIST}"), "Host: 169.254.169.254\r\n".to_owned(), 404),
        (format!("http://u@169.254.169.254{LIST}"), "Host: 169.254.169.254\r\n".to_owned(), 404),
    ] {
        let request = format!("GET {line} HTTP/1.1\r\nConnection: close\r\n{host}\r\n");
        let reply = Reply::parse(&node.raw(2, request.as_bytes()).await);
        assert_eq!(reply.status, status, "{line} {host}");
    }
    let old = node.raw(2, format!("GET {LIST} HTTP/1.0\r\n\r\n").as_bytes()).await;
    assert_eq!(Reply::parse(&old).body, "reader");
}

#[tokio::test]
async fn own_address_is_a_host_where_it_is_named() {
    let mut config = config();
    config.own_addresses = vec!["127.0.0.1".parse().unwrap()];
    let node = Node::usual(config, Identity::SourceIp).await;
    let host =
        format!("GET {LIST} HTTP/1.1\r\nConnection: close\r\nHost: {}\r\n\r\n", node.address);
    assert_eq!(Reply::parse(&node.raw(2, host.as_bytes()).await).status, 200);
}

#[tokio::test]
async fn head_has_the_length_and_no_body() {
    let node = Node::usual(config(), Identity::Kernel).await;
    for path in [LIST.to_owned(), format!("{LIST}reader")] {
        let got = node.get(2, &path).await;
        let head = node.send(2, &format!("HEAD {path}"), "").await;
        assert_eq!((head.status, head.body.as_str()), (200, ""));
        assert_eq!(head.header("content-length"), got.header("content-length"));
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let one = |path: &str, close: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{close}\r\n")
    };
    let requests = [
        one(LIST, ""),
        one("/latest/user-data", ""),
        one(&format!("{LIST}reader"), "Connection: close\r\n"),
    ];
    let text = node.raw(2, requests.concat().as_bytes()).await;
    assert_eq!(statuses(&text), ["200", "404", "200"], "{text}");
    assert!(text.ends_with(&body_of("reader")));
}

#[tokio::test]
async fn only_normalised_paths_and_no_client_byte_reach_the_nodes_service() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let marker = "X-Marker: hunter2\r\nCookie: hunter2\r\nUser-Agent: hunter2\r\n";
    for (path, body) in [
        ("/latest/meta-data/placement/region?hunter2", "node:/latest/meta-data/placement/region"),
        ("/2019-10-01/meta-data/placement/region", "node:/latest/meta-data/placement/region"),
        (
            "/latest/meta-data/placement/availability-zone/",
            "node:/latest/meta-data/placement/availability-zone",
        ),
        ("/latest/meta-data/mac", "node:/latest/meta-data/mac"),
        ("/1.0/meta-data/mac", "node:/latest/meta-data/mac"),
    ] {
        let reply = node.send(2, &format!("GET {path}"), marker).await;
        assert_eq!((reply.status, reply.body.as_str()), (200, body), "{path}");
    }
    for path in [
        "/latest/user-data",
        "/latest/meta-data/iam/x",
        "/latest/meta-data/%6dac",
        "/latest/meta-data/identity-credentials/ec2/info",
    ] {
        assert_eq!(node.get(2, path).await.status, 404, "{path}");
    }
    // Unattested or unknown: not even what everybody may read.
    assert_eq!(node.get(66, "/latest/meta-data/mac").await.status, 403);
    assert_eq!(node.get(9, "/latest/meta-data/mac").await.status, 404);
    let lines: Vec<_> = node.imds.heard();
    let asked: Vec<_> = lines.iter().map(|head| head.lines().next().unwrap()).collect();
    assert_eq!(
        asked,
        [
            "PUT /latest/api/token HTTP/1.1",
            // Asked once, for it can't change.
            "GET /latest/meta-data/placement/region HTTP/1.1",
            "GET /latest/meta-data/placement/availability-zone HTTP/1.1",
            "GET /latest/meta-data/mac HTTP/1.1",
            "GET /latest/meta-data/mac HTTP/1.1",
        ]
    );
    assert!(!lines.concat().contains("hunter2"));
}

#[tokio::test]
async fn address_in_the_query_counts_only_where_it_is_allowed() {
    let asked = format!("{LIST}?ip=127.0.0.3");
    let node = Node::usual(config(), Identity::SourceIp).await;
    assert_eq!(node.get(2, &asked).await.body, "reader");
    let mut open = config();
    open.allow_ip_query = true;
    let node = Node::usual(open, Identity::SourceIp).await;
    assert_eq!(node.get(2, &asked).await.body, "writer");
    assert_eq!(node.get(2, LIST).await.body, "reader");
    for bad in ["?ip=", "?ip=x", "?ip=127.0.0.2&ip=127.0.0.3"] {
        assert_eq!(node.get(2, &format!("{LIST}{bad}")).await.status, 404, "{bad}");
    }
}

#[tokio::test]
async fn garbage_neither_breaks_nor_passes() {
    let node = Node::usual(config(), Identity::Kernel).await;
    let long = "a".repeat(20_000);
    let corpus = [
        "\r\n\r\n".to_owned(),
        "\0\0\0\0\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\n Host: x\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_owned(),
        "PUT /latest/api/token HTTP/1.1\r\nTransfer-Encoding: chunked, x\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nX: {long}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(2_000)),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}".repeat(8) + "\r\n\r\n",
    ];
    let mut random = fastrand::Rng::with_seed(7);
    for text in &corpus {
        let answer = until_closed(&node, text.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{text:.80} {answer}");
        for _ in 0..20 {
            let mut bytes = text.clone().into_bytes();
            for byte in &mut bytes {
                if random.u8(..20) == 0 {
                    *byte = random.u8(..);
                }
            }
            // Whatever it is now, it comes to an end, and what is answered is no credential.
            let answer = until_closed(&node, &bytes).await;
            assert!(!answer.contains("Success"), "{answer}");
        }
    }
    assert_eq!(node.get(2, LIST).await.body, "reader");
}

/// All that is answered to `bytes` and the end of the stream.
async fn until_closed(node: &Node, bytes: &[u8]) -> String {
    let mut stream = node.connect(2).await;
    // The agent may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    let _ = read.expect("the connection is closed in time");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn drain_answers_what_is_held_and_takes_nothing_new() {
    let node = Node::start(config(), Identity::Kernel).await;
    node.index.apply(namespace("default", None));
    let mut stream = node.connect(9).await;
    let request = format!("GET {LIST} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    sleep(Duration::from_millis(50)).await;
    node.drain.start();
    let mut answer = String::new();
    timeout(Duration::from_secs(2), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(Reply::parse(&answer).status, 404);
    timeout(Duration::from_secs(2), node.task).await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(node.address).await.is_err());
}

impl Node {
    /// The usual node, whose requests need tokens only once it is set up.
    async fn usual_with_tokens(imdsv2: Imdsv2) -> Self {
        let mut config = config();
        config.imdsv2 = imdsv2;
        let node = Self::start(config, Identity::Kernel).await;
        node.index.apply(namespace("default", None));
        node.index.apply(pod(2, Some("reader")));
        node.index.apply(pod(3, Some("writer")));
        node
    }
}
