//! A whole metadata service on a loopback socket: the real index, policy, prefetcher and accept loop,
//! with a stand-in for AWS and one for the node's own metadata service. Pods are addresses of 127/8.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use super::super::{
    Config, Imdsv2, Journal, Metrics, Service, ServiceParts, TokenAuthority, Upstream, wire,
};
use crate::{audit::Audit, serve};
use kiam_core::{
    clock::Clock,
    credentials::{self, Credentials, ErrorClass, Prefetcher, SourceError, fixtures::FnSource},
    lifecycle::{self, DrainSignal},
    pods::{
        Client, ClientResolver, Connection, Namespace, Origin, Pod, PodIndex, PodUid, Unattested,
    },
    policy::{self, RolePolicy},
    rate::Rate,
    role::{RoleArn, RoleIdentity, RoleResolver, WantedRoles},
    telemetry::Statsd,
};

pub(super) const LIST: &str = "/latest/meta-data/iam/security-credentials/";
pub(super) const EXTENDED: &str = "/latest/meta-data/iam/security-credentials-extended/";
/// 2026-01-01T00:00:00Z.
const EPOCH: u64 = 1_767_225_600;

/// How the stand-in for the kernel knows clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// By UID, but for 127.0.0.66, of which the kernel knows nothing.
    Kernel,
    /// The same, by pod listeners, which know no address.
    PodListener,
    SourceIp,
}

impl ClientResolver for Identity {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        let IpAddr::V4(address) = connection.peer.ip() else { return Err(Unattested::NoEntry) };
        match (self, address.octets()[3]) {
            (Self::Kernel | Self::PodListener, 66) => Err(Unattested::NoEntry),
            (Self::PodListener, n) => Ok(Client::PodListener { uid: uid(n), opener: None }),
            (Self::Kernel, n) => {
                let origin = Origin::Pod;
                Ok(Client::Pod { uid: uid(n), address: address.into(), origin, opener: None })
            }
            (Self::SourceIp, _) => Ok(Client::Address(address.into())),
        }
    }
}

pub(super) fn uid(n: u8) -> PodUid {
    PodUid::new(&format!("{n:08x}-0000-4000-8000-000000000000"))
}

/// Pod `n` of namespace `default` at 127.0.0.`n`.
pub(super) fn pod(n: u8, role: Option<&str>) -> Pod {
    Pod {
        resource_version: Some(1),
        node: Some("node".to_owned()),
        addresses: vec![Ipv4Addr::new(127, 0, 0, n).into()],
        role: role.map(Into::into),
        ..Pod::new(uid(n), "default", &format!("pod-{n}"))
    }
}

pub(super) fn namespace(name: &str, permitted: Option<&str>) -> Namespace {
    Namespace {
        resource_version: Some(1),
        permitted: permitted.map(Into::into),
        ..Namespace::new(name)
    }
}

/// AWS: `denied` may not be assumed, `never` is not answered, `slow` takes 150 ms.
async fn aws(role: RoleArn) -> Result<Credentials, SourceError> {
    match role.name() {
        "denied" => {
            let message = "AccessDenied: not\r\nauthorized".to_owned();
            return Err(SourceError { class: ErrorClass::Denied, message });
        }
        "never" => sleep(Duration::from_secs(3600)).await,
        "slow" => sleep(Duration::from_millis(150)).await,
        _ => {}
    }
    let issued = SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH);
    let key = format!("ASIA-{}", role.name());
    Ok(Credentials::test(&role, &key, issued, Duration::from_secs(3600)))
}

/// The body of `role`'s credentials.
pub(super) fn body_of(role: &str) -> String {
    format!(
        r#"{{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z","Type":"AWS-HMAC","AccessKeyId":"ASIA-{role}","SecretAccessKey":"secret","Token":"token","Expiration":"2026-01-01T01:00:00Z"}}"#
    )
}

/// The node's metadata service: knows tokens, echoes paths, and remembers all that it was sent.
pub(crate) struct NodeImds {
    pub(crate) address: SocketAddr,
    pub(crate) heard: Arc<Mutex<Vec<String>>>,
}

impl NodeImds {
    /// Answers by `answer`, which is given the head of a request and gives a status line and a body.
    pub(crate) async fn start(answer: fn(&str) -> (&'static str, String)) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heard: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = heard.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                let head = String::from_utf8(head).unwrap();
                let (status, body) = answer(&head);
                kept.lock().unwrap().push(head);
                let length = body.len();
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}");
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { address, heard }
    }

    pub(crate) fn upstream(&self) -> Upstream {
        Upstream::new(format!("http://{}", self.address).parse().unwrap())
    }

    pub(crate) fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

/// A service that wants tokens and says which path it was asked for.
pub(crate) fn imdsv2(head: &str) -> (&'static str, String) {
    if head.starts_with("PUT /latest/api/token ") {
        return ("200 OK", "node-token".to_owned());
    }
    if !head.contains("\r\nx-aws-ec2-metadata-token: node-token\r\n") {
        return ("401 Unauthorized", String::new());
    }
    ("200 OK", format!("node:{}", head.split(' ').nth(1).unwrap()))
}

/// No test is about a pod's share of requests.
const MANY: Rate = Rate { burst: 100_000, period: Duration::from_micros(10) };

/// The running service.
pub(super) struct Node {
    pub(super) index: PodIndex,
    pub(super) clock: Clock,
    pub(super) imds: NodeImds,
    pub(super) address: SocketAddr,
    pub(super) drain: DrainSignal,
    pub(super) journal: Journal,
    pub(super) task: tokio::task::JoinHandle<()>,
    registry: Registry,
}

/// What a client received.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Reply {
    /// The answer to another request of a connection.
    pub(super) async fn to(stream: &mut TcpStream, path: &str) -> Self {
        let request = format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut buffer = vec![0; 4096];
        let read = stream.read(&mut buffer).await.unwrap();
        Self::parse(std::str::from_utf8(&buffer[..read]).unwrap())
    }

    pub(super) fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

pub(super) fn config() -> Config {
    Config {
        hold: Duration::from_millis(300),
        imdsv2: Imdsv2::Optional,
        allow_paths: vec!["/latest/meta-data/*".parse().unwrap()],
        deny_paths: Vec::new(),
        allow_ip_query: false,
        node_roles: Vec::new(),
        own_addresses: Vec::new(),
    }
}

impl Node {
    pub(super) async fn start(config: Config, identity: Identity) -> Self {
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH + 1));
        let (index, pods) = PodIndex::new();
        index.heard::<Pod>();
        let policy = RolePolicy::new(
            policy::Config::new(RoleResolver::new(Some(
                "arn:aws:iam::123456789012:role/".parse().unwrap(),
            ))),
            pods.clone(),
        );
        let mut registry = Registry::default();
        let (drain, draining) = lifecycle::drain();
        let wanted = watch::Sender::new(WantedRoles::default());
        let known = pods.clone();
        let (prefetcher, credentials) = Prefetcher::new(
            credentials::Config::default(),
            credentials::PrefetcherParts {
                render: wire::render,
                names: Box::new(move |claimant| {
                    known.by_uid(&PodUid::new(&claimant.pod)).map(|pod| pod.name.clone()).ok()
                }),
                metrics: credentials::Metrics::register(&mut registry, Statsd::off()),
                ..credentials::PrefetcherParts::test(
                    FnSource(|identity: &RoleIdentity| aws(identity.role.clone())),
                    clock.clone(),
                    wanted.subscribe(),
                )
            },
        );
        tokio::spawn(prefetcher.run(draining.clone()));
        tokio::spawn(policy::publish_wanted(policy.clone(), |_| true, wanted, draining.clone()));
        let imds = NodeImds::start(imdsv2).await;
        let journal = Journal::default();
        let parts = ServiceParts {
            pods,
            policy,
            credentials,
            tokens: TokenAuthority::simulated(b"key"),
            upstream: imds.upstream(),
            clock: clock.clone(),
            metrics: Metrics::register(&mut registry, Statsd::off()),
            journal: journal.clone(),
            audit: Audit::default(),
        };
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let metrics = serve::Metrics::register(&mut registry);
        let (sender, listeners) = mpsc::channel(1);
        assert!(sender.try_send(serve::Listener::new(socket, Arc::new(identity))).is_ok());
        let task = tokio::spawn(serve::run(
            listeners,
            Arc::new(Service::new(config, parts)),
            serve::Config { requests: MANY, new_connections: MANY, ..serve::Config::default() },
            metrics,
            draining,
        ));
        Self { index, clock, imds, address, drain, journal, task, registry }
    }

    /// The usual node: pods 2 (`reader`), 3 (`team/writer`), 4 (no role), 5 (`denied`), 6 (`never`),
    /// 7 (a role that its namespace forbids), 8 (no such role).
    pub(super) async fn usual(config: Config, identity: Identity) -> Self {
        let node = Self::start(config, identity).await;
        node.index.apply(namespace("default", None));
        node.index.apply(namespace("strict", Some(".*role/other")));
        for (n, role) in [
            (2, Some("reader")),
            (3, Some("team/writer")),
            (4, None),
            (5, Some("denied")),
            (6, Some("never")),
            (8, Some("no such role")),
        ] {
            node.index.apply(pod(n, role));
        }
        let mut forbidden = pod(7, Some("reader"));
        forbidden.namespace = "strict".to_owned();
        node.index.apply(forbidden);
        // Until everything that can be fetched is there.
        for role in [(2, "reader"), (3, "writer")] {
            assert_eq!(node.get(role.0, LIST).await.body, role.1);
        }
        node
    }

    /// A connection of pod `n`.
    pub(super) async fn connect(&self, n: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, n], 0))).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    /// All that pod `n` is answered to `bytes` until the connection is closed.
    pub(super) async fn raw(&self, n: u8, bytes: &[u8]) -> String {
        let mut stream = self.connect(n).await;
        // The agent may close before it has read everything.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
        let _ = read.expect("the connection is closed in time");
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub(super) async fn send(&self, n: u8, line: &str, headers: &str) -> Reply {
        let request = format!(
            "{line} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n{headers}\r\n"
        );
        Reply::parse(&self.raw(n, request.as_bytes()).await)
    }

    pub(super) async fn get(&self, n: u8, path: &str) -> Reply {
        self.send(n, &format!("GET {path}"), "").await
    }

    pub(super) async fn token(&self, n: u8, ttl: u32) -> String {
        let header = format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}\r\n");
        let reply = self.send(n, "PUT /latest/api/token", &header).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.body
    }

    pub(super) fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text
    }
}
