use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::imds::{
    exchange::MAX_BODY,
    route::{Readable, Route, Routes},
    service::fixture::{NodeImds, imdsv2},
};
use kiam_core::pods::fixtures::uid;

fn path(text: &str) -> UpstreamPath {
    let routes = Routes::new(vec!["/latest/meta-data/*".parse().unwrap()], Vec::new());
    match routes.parse(&Method::GET, &format!("/latest/{text}")) {
        Ok(Route::Read(Readable::Upstream(path))) => path,
        other => panic!("{text}: {other:?}"),
    }
}

fn asked(imds: &NodeImds) -> Vec<String> {
    imds.heard().iter().map(|head| head.lines().next().unwrap().replace(" HTTP/1.1", "")).collect()
}

#[test]
fn urls_are_a_host_and_a_port() {
    for (text, shown) in [
        ("http://169.254.169.254", "http://169.254.169.254"),
        ("http://169.254.169.254/", "http://169.254.169.254"),
        ("http://169.254.169.254:80", "http://169.254.169.254"),
        ("http://[fd00:ec2::254]:8080", "http://[fd00:ec2::254]:8080"),
        ("http://imds.internal:1", "http://imds.internal:1"),
    ] {
        assert_eq!(text.parse::<UpstreamUrl>().unwrap().to_string(), shown);
    }
    for text in [
        "",
        "169.254.169.254",
        "https://169.254.169.254",
        "http://",
        "http:///latest",
        "http://169.254.169.254/latest",
        "http://169.254.169.254?x",
        "http://user@169.254.169.254",
        "http://169.254.169.254:",
        "http://169.254.169.254:65536",
        "http://169.254.169.254:+80",
        "unix:/run/imds",
    ] {
        let error = text.parse::<UpstreamUrl>().unwrap_err().to_string();
        assert!(error.contains(text) && error.contains("http://HOST"), "{error}");
    }
}

#[tokio::test]
async fn token_is_fetched_once_and_what_cannot_change_too() {
    let imds = NodeImds::start(imdsv2).await;
    let upstream = imds.upstream();
    for _ in 0..3 {
        let region = upstream.get(&UpstreamPath::region(), &Pod::test(1)).await.unwrap();
        assert_eq!(region, "node:/latest/meta-data/placement/region");
        upstream.get(&path("meta-data/mac"), &Pod::test(1)).await.unwrap();
    }
    let read = "GET /latest/meta-data/mac";
    assert_eq!(
        asked(&imds),
        ["PUT /latest/api/token", "GET /latest/meta-data/placement/region", read, read, read]
    );
    let heads = imds.heard();
    assert!(heads[0].contains("x-aws-ec2-metadata-token-ttl-seconds: 21600\r\n"), "{}", heads[0]);
    let host = format!("host: {}\r\n", imds.address);
    assert!(
        heads.iter().all(|head| head.contains(&host) && head.contains("connection: close\r\n"))
    );
}

#[tokio::test]
async fn service_without_tokens_is_asked_without() {
    let imds = NodeImds::start(|head| {
        if head.starts_with("PUT") {
            ("404 Not Found", String::new())
        } else {
            ("200 OK", "x".to_owned())
        }
    })
    .await;
    let upstream = imds.upstream();
    upstream.get(&path("meta-data/mac"), &Pod::test(1)).await.unwrap();
    upstream.get(&path("meta-data/mac"), &Pod::test(1)).await.unwrap();
    let read = "GET /latest/meta-data/mac";
    assert_eq!(asked(&imds), ["PUT /latest/api/token", read, read]);
    assert!(!imds.heard().concat().contains("x-aws-ec2-metadata-token:"));
}

#[tokio::test]
async fn refused_token_is_renewed_once() {
    let imds = NodeImds::start(|head| {
        if head.starts_with("PUT") {
            ("200 OK", "t".to_owned())
        } else {
            ("401 Unauthorized", String::new())
        }
    })
    .await;
    let error = imds.upstream().get(&path("meta-data/mac"), &Pod::test(1)).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Status(StatusCode::UNAUTHORIZED)), "{error}");
    let (token, read) = ("PUT /latest/api/token", "GET /latest/meta-data/mac");
    assert_eq!(asked(&imds), [token, read, token, read]);
}

#[tokio::test]
async fn answers_that_are_none_are_errors_and_not_kept() {
    type Answer = fn(&str) -> (&'static str, String);
    let cases: [(Answer, &str); 5] = [
        (|_| ("500 Internal Server Error", "x".to_owned()), "answered 500"),
        (|_| ("302 Found\r\nLocation: http://evil.example/", String::new()), "answered 302"),
        (|_| ("200 OK", String::new()), "an invalid body"),
        (|_| ("200 OK", "x".repeat(MAX_BODY + 1)), "an invalid body"),
        (|_| ("200 O\0K", "x".to_owned()), "broke"),
    ];
    for (answer, expected) in cases {
        let imds = NodeImds::start(answer).await;
        let upstream = imds.upstream();
        // Past the token, so that the answer to the path is seen.
        *lock(&upstream.0.session) = Session::V1 { until: Instant::now() + RETRY_TOKEN };
        for _ in 0..2 {
            let error =
                upstream.get(&UpstreamPath::region(), &Pod::test(1)).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(asked(&imds).len(), 2);
    }
}

/// Asks with a token that is known, and counts what the service hears.
async fn shared(
    answer: fn(&str) -> (&'static str, String),
    path: &UpstreamPath,
) -> (Upstream, NodeImds, Vec<Result<Bytes, UpstreamError>>) {
    let imds = NodeImds::start(answer).await;
    let upstream = imds.upstream();
    *lock(&upstream.0.session) = Session::V1 { until: Instant::now() + RETRY_TOKEN };
    let pod = Pod::test(1);
    let asked = (0..100).map(|_| upstream.get(path, &pod));
    let answers = futures::future::join_all(asked).await;
    (upstream, imds, answers)
}

#[tokio::test]
async fn what_every_pod_may_ask_is_asked_once_a_second_however_many_ask() {
    let spot = path("meta-data/spot/instance-action");
    let found = |_: &str| ("200 OK", "soon".to_owned());
    let (upstream, imds, answers) = shared(found, &spot).await;
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap() == "soon"), "{answers:?}");
    assert_eq!(asked(&imds).len(), 1);
    tokio::time::sleep(MOMENT).await;
    upstream.get(&spot, &Pod::test(1)).await.unwrap();
    assert_eq!(asked(&imds).len(), 2);
    // Mostly there is nothing, which may change at any time.
    for path in [spot, path("dynamic/instance-identity/document")] {
        let absent = |_: &str| ("404 Not Found", String::new());
        let (upstream, imds, answers) = shared(absent, &path).await;
        assert!(answers.iter().all(|it| matches!(it, Err(UpstreamError::NotFound))), "{answers:?}");
        assert_eq!(asked(&imds).len(), 1);
        tokio::time::sleep(MOMENT).await;
        upstream.get(&path, &Pod::test(1)).await.unwrap_err();
        assert_eq!(asked(&imds).len(), 2);
    }
}

/// Answers the next request, which must be for `path`.
async fn answer(listener: &TcpListener, path: &str) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut head = vec![0; 1024];
    let read = stream.read(&mut head).await.unwrap();
    let head = String::from_utf8_lossy(&head[..read]).into_owned();
    assert!(head.starts_with(&format!("GET /latest/{path} ")), "{head}");
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await.unwrap();
}

#[tokio::test]
async fn a_pod_that_floods_a_slow_service_leaves_it_to_others() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let upstream = Upstream::new(url.parse().unwrap());
    *lock(&upstream.0.session) = Session::V1 { until: Instant::now() + RETRY_TOKEN };
    let ask = |pod: u32, text: &str| {
        let (upstream, path) = (upstream.clone(), path(text));
        tokio::spawn(async move { upstream.get(&path, &Pod::test(pod)).await })
    };
    let flood: Vec<_> = (0..100).map(|_| ask(1, "meta-data/mac")).collect();
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(listener.accept().await.unwrap());
    }
    // Each of these would wait for a slot of the flood's.
    for (pod, text) in [(2, "meta-data/hostname"), (2, "dynamic/instance-identity/document")] {
        let asked = ask(pod, text);
        answer(&listener, text).await;
        assert_eq!(asked.await.unwrap().unwrap(), "x");
    }
    for asked in flood {
        assert!(matches!(asked.await.unwrap(), Err(UpstreamError::Deadline)));
    }
    drop(held);
    upstream.share(Sharer::Pod(uid(3)), SHARE);
    assert_eq!(lock(&upstream.0.shares).len(), 1, "shares of pods that ask no more are kept");
}

#[tokio::test]
async fn a_tenant_that_floods_a_slow_service_from_many_pods_leaves_it_to_others() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let upstream = Upstream::new(url.parse().unwrap());
    *lock(&upstream.0.session) = Session::V1 { until: Instant::now() + RETRY_TOKEN };
    let ask = |namespace: &str, pod: u32, text: &str| {
        let pod = Pod { namespace: namespace.to_owned(), ..Pod::test(pod) };
        let (upstream, path) = (upstream.clone(), path(text));
        tokio::spawn(async move { upstream.get(&path, &pod).await })
    };
    let flood: Vec<_> = (0..100).map(|n| ask("mob", n % 10, "meta-data/mac")).collect();
    let mut held = Vec::new();
    for _ in 0..NAMESPACE_SHARE {
        held.push(listener.accept().await.unwrap());
    }
    for round in 0..3 {
        let asked = ask("shop", 20 + round, "meta-data/hostname");
        answer(&listener, "meta-data/hostname").await;
        assert_eq!(asked.await.unwrap().unwrap(), "x");
    }
    for asked in flood {
        assert!(matches!(asked.await.unwrap(), Err(UpstreamError::Deadline)));
    }
}

/// A service that answers everything, after a while.
async fn late(after: Duration) -> Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = vec![0; 1024];
                let _ = stream.read(&mut head).await;
                tokio::time::sleep(after).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await;
            });
        }
    });
    let upstream = Upstream::new(url.parse().unwrap());
    *lock(&upstream.0.session) = Session::V1 { until: Instant::now() + RETRY_TOKEN };
    upstream
}

#[tokio::test]
async fn a_pod_that_hangs_up_before_the_answer_delays_nobody_who_waits_for_it_too() {
    let takes = Duration::from_millis(300);
    for notice in ["meta-data/spot/instance-action", "dynamic/instance-identity/document"] {
        let upstream = late(takes).await;
        let began = Instant::now();
        // One after the other hangs up before an answer can come, and the next one has its turn.
        for turn in 1..=10 {
            let (upstream, path) = (upstream.clone(), path(notice));
            let ends = began + (takes / 2) * turn;
            tokio::spawn(tokio::time::timeout_at(ends, async move {
                let _ = upstream.get(&path, &Pod::test(1)).await;
            }));
        }
        tokio::task::yield_now().await;
        let answer = upstream.get(&path(notice), &Pod::test(2)).await;
        assert_eq!(answer.unwrap(), "x", "{notice}, after {:?}", began.elapsed());
        assert!(began.elapsed() < takes * 2, "{notice}: {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn silent_service_costs_a_second() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let upstream = Upstream::new(url.parse().unwrap());
    let began = Instant::now();
    assert!(matches!(upstream.region().await, Err(UpstreamError::Deadline)));
    assert_eq!(began.elapsed().as_secs(), DEADLINE.as_secs());
}

#[tokio::test]
async fn unreachable_service_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = Upstream::new(url.parse().unwrap()).region().await.unwrap_err().to_string();
    assert!(error.contains(&url), "{error}");
}

#[tokio::test]
async fn base_arn_is_the_instance_profiles_account() {
    type Answer = fn(&str) -> (&'static str, String);
    let profile: Answer = |head| {
        if head.starts_with("PUT") {
            return ("200 OK", "t".to_owned());
        }
        assert!(head.starts_with("GET /latest/meta-data/iam/info "), "{head}");
        let arn = "arn:aws-cn:iam::123456789012:instance-profile/path/node";
        (
            "200 OK",
            format!("{{\n  \"Code\" : \"Success\",\n  \"InstanceProfileArn\" : \"{arn}\"\n}}"),
        )
    };
    let base = NodeImds::start(profile).await.upstream().base_arn().await.unwrap();
    assert_eq!(base.to_string(), "arn:aws-cn:iam::123456789012:role/");
    let bad: [Answer; 3] = [
        |_| ("200 OK", "<html>".to_owned()),
        |_| {
            ("200 OK", r#"{"InstanceProfileArn":"arn:aws:iam::123456789012:role/node"}"#.to_owned())
        },
        |_| ("200 OK", r#"{"InstanceProfileArn":"nonsense:instance-profile/node"}"#.to_owned()),
    ];
    for answer in bad {
        let upstream = NodeImds::start(answer).await.upstream();
        *lock(&upstream.0.session) = Session::V1 { until: Instant::now() + RETRY_TOKEN };
        assert!(upstream.base_arn().await.is_err());
    }
}

#[tokio::test]
async fn region_is_a_name() {
    let imds = NodeImds::start(|head| {
        if head.starts_with("PUT") {
            ("200 OK", "t".to_owned())
        } else {
            ("200 OK", "us-east-1\n".to_owned())
        }
    })
    .await;
    assert_eq!(imds.upstream().region().await.unwrap(), "us-east-1");
    let imds = NodeImds::start(|head| {
        if head.starts_with("PUT") {
            ("200 OK", "t".to_owned())
        } else {
            ("200 OK", "evil.example/?".to_owned())
        }
    })
    .await;
    assert!(matches!(imds.upstream().region().await, Err(UpstreamError::Body)));
}
