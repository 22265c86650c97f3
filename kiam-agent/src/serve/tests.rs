//! What a peer sees of the accept loop, over real sockets.

use std::net::SocketAddr;

use http_body_util::BodyExt as _;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
    task::JoinHandle,
    time::Instant,
};

use super::*;
use crate::lifecycle::{self, DrainSignal};

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

/// Answers with who is calling; `/panic` panics, `/large` is 256 KiB long.
struct Echo;

impl PodService for Echo {
    async fn call(
        &self,
        client: Arc<Result<Client, Unattested>>,
        request: Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let _ = request.into_body().collect().await;
        assert!(path != "/panic", "as the test asks for");
        let body = if path == "/large" { "x".repeat(1 << 18) } else { format!("{client:?}") };
        Response::new(Full::new(body.into()))
    }
}

struct SourceIp;

impl ClientResolver for SourceIp {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        Ok(Client::Address(connection.peer.ip()))
    }
}

struct Nobody;

impl ClientResolver for Nobody {
    fn resolve(&self, _: &Connection) -> Result<Client, Unattested> {
        Err(Unattested::NoEntry)
    }
}

struct Fixture {
    addresses: Vec<SocketAddr>,
    drain: DrainSignal,
    task: JoinHandle<()>,
    registry: Registry,
}

impl Fixture {
    async fn start(config: Config, resolvers: Vec<Arc<dyn ClientResolver>>) -> Self {
        let mut listeners = Vec::new();
        for resolver in resolvers {
            let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listeners.push(Listener { socket, resolver });
        }
        let addresses =
            listeners.iter().map(|listener| listener.socket.local_addr().unwrap()).collect();
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let (drain, draining) = lifecycle::drain();
        let task = tokio::spawn(run(listeners, Arc::new(Echo), config, metrics, draining));
        Self { addresses, drain, task, registry }
    }

    async fn with(config: Config) -> Self {
        Self::start(config, vec![Arc::new(SourceIp)]).await
    }

    async fn connect(&self, n: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind(([127, 0, 0, n], 0).into()).unwrap();
        socket.connect(self.addresses[0]).await.unwrap()
    }
}

/// What is read at once; empty when the connection was closed or reset.
async fn read(stream: &mut TcpStream) -> String {
    let mut buffer = vec![0; 4096];
    let read = timeout(Duration::from_secs(5), stream.read(&mut buffer)).await;
    let length = read.expect("something happens in time").unwrap_or_default();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
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
    let mut metrics = String::new();
    encode(&mut metrics, &node.registry).unwrap();
    for line in ["{identity=\"Attested\"} 1", "{identity=\"NoEntry\"} 1"] {
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[tokio::test]
async fn panic_of_one_request_leaves_the_others() {
    let node = Fixture::with(Config::default()).await;
    let mut other = node.connect(3).await;
    assert!(ask(&mut other).await.contains("127.0.0.3"));
    let mut stream = node.connect(2).await;
    stream.write_all(b"GET /panic HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert_eq!(read(&mut stream).await, "");
    assert!(ask(&mut other).await.contains("127.0.0.3"));
    assert!(ask(&mut node.connect(2).await).await.contains("127.0.0.2"));
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_until_there_is_room() {
    let config = Config { connections_per_peer: 2, connections: 3, ..Config::default() };
    let node = Fixture::with(config).await;
    let mut held = [node.connect(2).await, node.connect(2).await];
    for stream in &mut held {
        assert!(ask(stream).await.contains("200 OK"));
    }
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
        connections_per_peer: 1,
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
