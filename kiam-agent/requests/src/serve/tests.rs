//! What a peer sees of the accept loop, over real sockets.

mod hostile;

use std::net::SocketAddr;

use http_body_util::BodyExt as _;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
    sync::Semaphore,
    task::JoinHandle,
};

use super::*;
use kiam_core::{
    lifecycle::{self, DrainSignal},
    pods::{Origin, fixtures::uid},
    telemetry::captured::CapturedLogs,
};

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

/// Answers with who is calling; `/panic` panics, `/large` is 256 KiB long, `/held` never comes, `/work` takes a
/// millisecond of the processor. Or passes everybody on.
struct Echo {
    relay: Result<Option<Relay>, NotFound>,
    /// A permit for each request that is held.
    held: Arc<Semaphore>,
}

impl PodService for Echo {
    type Session = ();

    async fn relay(&self, _: &Client) -> Result<Option<Relay>, NotFound> {
        self.relay.clone()
    }

    async fn call(
        &self,
        client: &Result<Client, Unattested>,
        (): &(),
        request: Request<Incoming>,
        _: Instant,
    ) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let _ = request.into_body().collect().await;
        assert!(path != "/panic", "as the test asks for");
        if path == "/held" {
            self.held.add_permits(1);
            std::future::pending::<()>().await;
        }
        let begun = Instant::now();
        while path == "/work" && begun.elapsed() < Duration::from_millis(1) {}
        let body = if path == "/large" { "x".repeat(1 << 18) } else { format!("{client:?}") };
        Response::new(Full::new(body.into()))
    }

    fn pod(&self, client: &Client) -> Option<Arc<Pod>> {
        matches!(client, Client::Pod { .. }).then(|| Arc::new(Pod::test(1)))
    }
}

struct SourceIp;

impl ClientResolver for SourceIp {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        Ok(Client::Address(connection.peer.ip()))
    }
}

/// Whoever connects is the nth pod.
struct OnePod(u32);

impl ClientResolver for OnePod {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        let address = connection.peer.ip();
        Ok(Client::Pod { uid: uid(self.0), address, origin: Origin::Pod, opener: None })
    }
}

struct Nobody;

impl ClientResolver for Nobody {
    fn resolve(&self, _: &Connection) -> Result<Client, Unattested> {
        Err(Unattested::NoEntry)
    }
}

struct Panics;

impl ClientResolver for Panics {
    fn resolve(&self, _: &Connection) -> Result<Client, Unattested> {
        panic!("as the test asks for")
    }
}

struct Fixture {
    addresses: Vec<SocketAddr>,
    drain: DrainSignal,
    task: JoinHandle<()>,
    registry: Registry,
    sender: mpsc::Sender<Listener>,
    answering: Arc<Semaphore>,
}

impl Fixture {
    async fn start(config: Config, resolvers: Vec<Arc<dyn ClientResolver>>) -> Self {
        Self::of(Ok(None), config, resolvers).await
    }

    async fn of(
        relay: Result<Option<Relay>, NotFound>,
        config: Config,
        resolvers: Vec<Arc<dyn ClientResolver>>,
    ) -> Self {
        let answering = Arc::new(Semaphore::new(0));
        let service = Echo { relay, held: answering.clone() };
        let (sender, listeners) = mpsc::channel(8);
        let mut addresses = Vec::new();
        for resolver in resolvers {
            let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(socket.local_addr().unwrap());
            sender.send(Listener::new(socket, resolver)).await.unwrap();
        }
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let (drain, draining) = lifecycle::drain();
        let task = tokio::spawn(run(listeners, Arc::new(service), config, metrics, draining));
        Self { addresses, drain, task, registry, sender, answering }
    }

    async fn with(config: Config) -> Self {
        Self::start(config, vec![Arc::new(SourceIp)]).await
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text
    }

    /// All that is answered to `bytes` from 127.0.0.2 at the nth listener until the connection ends.
    async fn raw(&self, listener: usize, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.addresses[listener]).await.unwrap();
        // The agent may close before it has read everything.
        let _ = stream.write_all(bytes).await;
        to_end(&mut stream).await
    }

    async fn connect(&self, n: u8) -> TcpStream {
        self.connect_to(0, n).await
    }

    /// From 127.0.0.`n`, by a socket that takes little that it does not read.
    async fn connect_to(&self, listener: usize, n: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.set_send_buffer_size(4096).unwrap();
        socket.bind(([127, 0, 0, n], 0).into()).unwrap();
        socket.connect(self.addresses[listener]).await.unwrap()
    }

    /// One whose request is in work from now on.
    async fn held(&self, listener: usize, n: u8) -> TcpStream {
        let mut stream = self.connect_to(listener, n).await;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert!(read(&mut stream).await.contains("200 OK"));
        stream.write_all(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        self.answering.acquire().await.unwrap().forget();
        stream
    }
}

/// What is read at once; empty when the connection was closed or reset.
async fn read(stream: &mut TcpStream) -> String {
    let mut buffer = vec![0; 4096];
    let read = timeout(Duration::from_secs(5), stream.read(&mut buffer)).await;
    let length = read.expect("something happens in time").unwrap_or_default();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// Everything until the connection is closed or reset.
async fn to_end(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
    let _ = read.expect("the connection is closed in time");
    String::from_utf8_lossy(&answer).into_owned()
}

async fn ask(stream: &mut TcpStream) -> String {
    let _ = stream.write_all(GET).await;
    read(stream).await
}

#[tokio::test]
async fn each_listener_has_its_own_resolver() {
    let node = Fixture::start(Config::default(), vec![Arc::new(SourceIp), Arc::new(Nobody)]).await;
    for (address, expected) in
        [(node.addresses[0], "Ok(Address(127.0.0.1))"), (node.addresses[1], "Err(NoEntry)")]
    {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let answer = ask(&mut stream).await;
        assert!(answer.ends_with(expected), "{answer}");
    }
    let metrics = node.metrics();
    for line in ["{identity=\"Attested\"} 1", "{identity=\"NoEntry\"} 1"] {
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[tokio::test]
async fn listeners_end_together() {
    let node = Fixture::start(Config::default(), vec![Arc::new(SourceIp), Arc::new(Panics)]).await;
    let _stream = TcpStream::connect(node.addresses[1]).await.unwrap();
    timeout(Duration::from_secs(5), node.task).await.expect("all ends").unwrap();
    assert!(TcpStream::connect(node.addresses[0]).await.is_err());
}

#[tokio::test]
async fn panic_of_one_request_leaves_the_others() {
    let node = Fixture::with(Config::default()).await;
    let (mut other, mut own) = (node.connect(3).await, node.connect(2).await);
    assert!(ask(&mut other).await.contains("127.0.0.3"));
    assert!(ask(&mut own).await.contains("127.0.0.2"));
    let mut stream = node.connect(2).await;
    stream.write_all(b"GET /panic HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert_eq!(read(&mut stream).await, "");
    assert!(ask(&mut other).await.contains("127.0.0.3"));
    assert!(ask(&mut own).await.contains("127.0.0.2"), "in the same lane");
    assert!(ask(&mut node.connect(2).await).await.contains("127.0.0.2"));
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_until_there_is_room() {
    let config = Config { connections_per_pod: 2, connections: 3, ..Config::default() };
    let node = Fixture::with(config).await;
    let held = [node.held(0, 2).await, node.held(0, 2).await];
    assert_eq!(ask(&mut node.connect(2).await).await, "", "its own limit");
    let mut other = node.connect(3).await;
    assert!(ask(&mut other).await.contains("127.0.0.3"), "another's is not touched");
    assert_eq!(ask(&mut node.connect(4).await).await, "", "the limit of all");
    drop(held);
    eventually(&node, 4).await;
}

#[tokio::test]
async fn slow_heads_and_idle_connections_are_closed() {
    let config = Config { header_deadline: Duration::from_millis(200), ..Config::default() };
    let node = Fixture::with(config).await;
    let mut slow = node.connect(2).await;
    slow.write_all(&GET[..10]).await.unwrap();
    let mut idle = node.connect(3).await;
    assert!(ask(&mut idle).await.contains("200 OK"));
    let mut silent = node.connect(4).await;
    let began = Instant::now();
    for stream in [&mut slow, &mut idle, &mut silent] {
        let answer = read(stream).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn who_asks_and_never_reads_loses_its_connection() {
    let config = Config {
        connections_per_pod: 1,
        unread_deadline: Duration::from_millis(300),
        ..Config::default()
    };
    let node = Fixture::with(config).await;
    let mut stalled = node.connect(2).await;
    let large = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n".repeat(64);
    stalled.write_all(&large).await.unwrap();
    // Its slot is free again, though it is still open at this end.
    eventually(&node, 2).await;
    drop(stalled);
}

#[tokio::test]
async fn pods_that_share_an_address_do_not_share_a_limit() {
    let config = Config { connections_per_pod: 2, ..Config::default() };
    let node = Fixture::start(config, vec![Arc::new(OnePod(1)), Arc::new(OnePod(2))]).await;
    let _held = [node.held(0, 1).await, node.held(0, 1).await];
    assert_eq!(node.raw(0, GET).await, "", "its own limit");
    let mut other = TcpStream::connect(node.addresses[1]).await.unwrap();
    assert!(ask(&mut other).await.contains("200 OK"), "another pod's at the same address");
    let metrics = node.metrics();
    assert!(metrics.contains("{identity=\"OverLimit\"} 1"), "{metrics}");
}

#[tokio::test]
async fn strangers_have_one_answer_little_time_and_a_limit_of_their_own() {
    let config = Config {
        stranger_deadline: Duration::from_millis(200),
        connections_of_strangers: 2,
        ..Config::default()
    };
    let node = Fixture::start(config, vec![Arc::new(Nobody), Arc::new(OnePod(1))]).await;
    let answer = node.raw(0, &GET.repeat(3)).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 1, "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    let began = Instant::now();
    let mut silent = [
        node.connect(2).await,
        node.connect(3).await,
        node.connect(4).await,
        node.connect(5).await,
    ];
    let mut pod = TcpStream::connect(node.addresses[1]).await.unwrap();
    assert!(ask(&mut pod).await.contains("200 OK"));
    for stream in &mut silent {
        let answer = read(stream).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let metrics = node.metrics();
    assert!(metrics.contains("{identity=\"OverLimit\"} 2"), "{metrics}");
    assert!(ask(&mut pod).await.contains("200 OK"), "a pod's connection stays");
}

#[tokio::test]
async fn a_flood_of_strangers_is_one_line_of_the_log() {
    let captured = CapturedLogs::start(tracing::Level::WARN);
    let node = Fixture::start(Config::default(), vec![Arc::new(Nobody)]).await;
    let lines = || captured.lines_with("Connection of no known pod");
    for _ in 0..50 {
        node.raw(0, GET).await;
    }
    // As many lines as seconds passed, at most.
    let count = lines().len();
    assert!((1..10).contains(&count), "{:?}", lines());
    sleep(LOG_PERIOD).await;
    node.raw(0, GET).await;
    let left_out = |line: &String| {
        let (_, after) = line.split_once("left_out=").unwrap();
        after.split(' ').next().unwrap().parse::<usize>().unwrap()
    };
    let left_out: usize = lines().iter().map(left_out).sum();
    assert_eq!(left_out + lines().len(), 51, "{:?}", lines());
}

#[tokio::test]
async fn a_burst_of_connections_waits_in_the_queue() {
    let node = Fixture::with(Config::default()).await;
    let address = node.addresses[0];
    assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
    // Nothing is accepted meanwhile, for this thread is the runtime's.
    let connect = |n| {
        let stream = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(500));
        stream.unwrap_or_else(|error| panic!("connection {n}: {error}"))
    };
    let burst: Vec<_> = (0..500).map(connect).collect();
    drop(burst);
    eventually(&node, 3).await;
}

#[tokio::test]
async fn heads_have_limits() {
    let node = Fixture::with(Config::default()).await;
    let head = |target: &str, fields: &str| {
        format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n")
    };
    let field = |length| format!("X: {}\r\n", "x".repeat(length));
    for (request, statuses) in [
        (head("/", &field(15_000)), &["200"][..]),
        (head("/", &field(17_000)), &["431"]),
        (head("/", &"X: x\r\n".repeat(126)), &["200"]),
        (head("/", &"X: x\r\n".repeat(127)), &["431"]),
        (head(&format!("/{}", "x".repeat(15_000)), ""), &["200"]),
        (head(&format!("/{}", "x".repeat(17_000)), ""), &["414", "431"]),
        (head(&format!("/{}", "x".repeat(70_000)), ""), &["414", "431"]),
        // A head that never ends.
        ("X".repeat(100_000), &["400", "431"]),
        (format!("GET / HTTP/1.1\r\n{}", "X: x\r\n".repeat(10_000)), &["431"]),
    ] {
        let answer = node.raw(0, request.as_bytes()).await;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(statuses.contains(&status), "{statuses:?}: {answer} to {:.80}", request);
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
    assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
}

#[tokio::test]
async fn old_and_odd_http_is_answered_as_it_asks_or_refused() {
    let node = Fixture::with(Config::default()).await;
    let keep = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
    for (request, answers, status) in [
        // HTTP/1.0 closes, unless it is asked not to.
        ("GET / HTTP/1.0\r\n\r\n".repeat(2), 1, "200"),
        (format!("{keep}GET / HTTP/1.0\r\n\r\n"), 2, "200"),
        // Nothing follows a request that says that it is the last.
        ("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".repeat(2), 1, "200"),
        // 100 pipelined ones.
        (format!("{}GET / HTTP/1.0\r\n\r\n", String::from_utf8_lossy(GET).repeat(99)), 100, "200"),
        // There is nothing to wait for, so nothing to continue.
        (
            "GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n".into(),
            1,
            "200",
        ),
        // An upgrade is not taken.
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: h2c\r\n\r\n"
                .into(),
            1,
            "200",
        ),
        // HTTP/0.9, HTTP/2, and what is no HTTP at all.
        ("GET /\r\n\r\n".into(), 1, "400"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), 0, ""),
        ("\u{16}\u{3}\u{1}\0\u{5}\u{1}\0\0\0\0\r\n\r\n".into(), 1, "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello".into(), 1, "400"),
        ("GET / HTTP/1.1\r\nHost : x\r\n\r\n".into(), 1, "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n".into(), 1, "400"),
    ] {
        let answer = node.raw(0, request.as_bytes()).await;
        let found: Vec<&str> = answer
            .match_indices("HTTP/1.")
            .map(|(at, _)| &answer[at + "HTTP/1.1 ".len()..][..3])
            .collect();
        assert_eq!(found, vec![status; answers], "{answer} to {request:.120}");
    }
}

/// A server that answers each 5 bytes with 4, and the connections that it has.
async fn real_service() -> (Relay, Arc<std::sync::Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = Relay { host: "127.0.0.1".to_owned(), port: listener.local_addr().unwrap().port() };
    let heard: Arc<std::sync::Mutex<Vec<u8>>> = Arc::default();
    let kept = heard.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let kept = kept.clone();
            tokio::spawn(async move {
                let mut five = [0; 5];
                while stream.read_exact(&mut five).await.is_ok() {
                    kept.lock().unwrap().extend_from_slice(&five);
                    stream.write_all(b"pong").await.unwrap();
                }
                // The end of the pod's side is seen here; what follows it still arrives.
                let _ = stream.write_all(b"bye").await;
            });
        }
    });
    (relay, heard)
}

async fn relayed(config: Config) -> (Fixture, Arc<std::sync::Mutex<Vec<u8>>>) {
    let (relay, heard) = real_service().await;
    let node = Fixture::of(Ok(Some(relay)), config, vec![Arc::new(OnePod(1))]).await;
    (node, heard)
}

/// The relays' metric has this outcome, within bounds.
async fn ended(node: &Fixture, outcome: &str) {
    let line = format!("kiam_serve_relays_total{{outcome=\"{outcome}\"}} 1");
    for _ in 0..100 {
        if node.metrics().contains(&line) {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("{line} is not in {}", node.metrics());
}

#[tokio::test]
async fn a_connection_is_passed_on_as_bytes_both_ways_with_its_end() {
    let (node, heard) = relayed(Config::default()).await;
    let mut stream = node.connect(2).await;
    for _ in 0..2 {
        stream.write_all(b"\0\xff\r\n\n").await.unwrap();
        assert_eq!(read(&mut stream).await, "pong");
    }
    stream.shutdown().await.unwrap();
    assert_eq!(to_end(&mut stream).await, "bye");
    assert_eq!(*heard.lock().unwrap(), b"\0\xff\r\n\n\0\xff\r\n\n");
    ended(&node, "Closed").await;
}

#[tokio::test]
async fn a_connection_that_is_passed_on_has_limits_too() {
    let short = Duration::from_millis(300);
    let (node, _) = relayed(Config { relay_idle: short, ..Config::default() }).await;
    let mut stream = node.connect(2).await;
    let began = Instant::now();
    while began.elapsed() < short * 2 {
        stream.write_all(b"12345").await.unwrap();
        assert_eq!(read(&mut stream).await, "pong", "it is not idle");
        sleep(short / 10).await;
    }
    assert_eq!(read(&mut stream).await, "");
    ended(&node, "Idle").await;

    let (node, _) = relayed(Config { relay_total: short, ..Config::default() }).await;
    let mut stream = node.connect(2).await;
    let began = Instant::now();
    while stream.write_all(b"12345").await.is_ok() && read(&mut stream).await == "pong" {
        assert!(began.elapsed() < short * 10);
    }
    ended(&node, "Overtime").await;

    let (node, _) = relayed(Config::default()).await;
    let mut stream = node.connect(2).await;
    stream.write_all(b"12345").await.unwrap();
    assert_eq!(read(&mut stream).await, "pong");
    node.drain.start();
    assert_eq!(read(&mut stream).await, "");
    ended(&node, "Drained").await;
}

#[tokio::test]
async fn nobody_to_pass_on_to_closes_and_an_unknown_pod_is_answered_as_such() {
    // Bound and not listening: nobody is there, and nobody else comes.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    let relay = Relay { host: "127.0.0.1".to_owned(), port };
    let pods: Vec<Arc<dyn ClientResolver>> = vec![Arc::new(OnePod(1))];
    let node = Fixture::of(Ok(Some(relay)), Config::default(), pods.clone()).await;
    assert_eq!(node.raw(0, GET).await, "");
    ended(&node, "Unreachable").await;

    let node = Fixture::of(Err(NotFound::Unknown), Config::default(), pods).await;
    let answer = node.raw(0, &GET.repeat(2)).await;
    assert!(answer.contains("Err(Unknown {"), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
}

#[tokio::test]
async fn accepted_sockets_have_the_options_of_their_listener() {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listener = Listener::new(socket, Arc::new(Nobody));
    let config = Config { unread_deadline: Duration::from_millis(300), ..Config::default() };
    listener.prepare(&config);
    let connect = TcpStream::connect(listener.socket.local_addr().unwrap());
    let (_client, accepted) = tokio::join!(connect, listener.socket.accept());
    let (accepted, _) = accepted.unwrap();
    assert!(accepted.nodelay().unwrap());
    assert_eq!(sockopt::tcp_user_timeout(&accepted).unwrap(), 300);
}

#[tokio::test]
async fn a_listener_may_come_later_and_go_while_others_stay() {
    let node = Fixture::with(Config::default()).await;
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let later = Listener::new(socket, Arc::new(Nobody));
    let closed = later.closed.clone();
    node.sender.send(later).await.unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut stream).await.ends_with("Err(NoEntry)"));
    closed.cancel();
    for _ in 0..100 {
        if TcpStream::connect(address).await.is_err() {
            assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("the listener stays");
}

#[tokio::test]
async fn drain_closes_idle_connections_and_the_listener() {
    let node = Fixture::with(Config::default()).await;
    let mut idle = node.connect(2).await;
    assert!(ask(&mut idle).await.contains("200 OK"));
    node.drain.start();
    assert_eq!(read(&mut idle).await, "");
    timeout(Duration::from_secs(2), node.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(node.addresses[0]).await.is_err());
}

#[tokio::test]
async fn what_connected_before_the_drain_is_answered_and_told_to_connect_anew() {
    let node = Fixture::with(Config::default()).await;
    let mut silent = node.connect(2).await;
    let mut known = node.connect(3).await;
    assert!(!ask(&mut known).await.contains("connection: close"));
    node.drain.start();
    let mut late = node.connect(4).await;
    for stream in [&mut silent, &mut known, &mut late] {
        let answer = ask(stream).await;
        assert!(answer.contains("200 OK") && answer.contains("connection: close"), "{answer}");
        assert_eq!(read(stream).await, "", "closed after its answer");
    }
    timeout(Duration::from_secs(2), node.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_connects_after_the_sockets_were_handed_over_is_the_successors() {
    let node = Fixture::with(Config::default()).await;
    let mut known = node.connect(3).await;
    assert!(ask(&mut known).await.contains("200 OK"));
    node.drain.hand_over(true);
    assert!(ask(&mut known).await.contains("200 OK"), "it was accepted here");
    timeout(Duration::from_millis(400), node.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(node.addresses[0]).await.is_err(), "nobody has it here");
}

#[tokio::test]
async fn what_connects_to_a_pod_listener_that_no_successor_has_is_answered_all_the_same() {
    let mut nodes = Vec::new();
    for _ in 0..8 {
        let node = Fixture::with(Config::default()).await;
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let own = Listener { passed: Arc::default(), ..Listener::new(socket, Arc::new(SourceIp)) };
        // Which of these two the loop sees first is left to chance.
        node.sender.send(own).await.unwrap();
        node.drain.hand_over(true);
        nodes.push((node, address));
    }
    for (_, address) in &nodes {
        let mut late = TcpStream::connect(address).await.unwrap();
        let answer = ask(&mut late).await;
        assert!(answer.contains("200 OK") && answer.contains("connection: close"), "{answer}");
    }
    for (node, address) in nodes {
        timeout(Duration::from_secs(2), node.task).await.unwrap().unwrap();
        assert!(TcpStream::connect(address).await.is_err(), "not for long");
    }
}

/// A connection of peer `n` is served, within bounds.
async fn eventually(node: &Fixture, n: u8) {
    for _ in 0..50 {
        if ask(&mut node.connect(n).await).await.contains("200 OK") {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("127.0.0.{n} is not served");
}
