//! One pod takes all it can, and another asks meanwhile.

use std::{
    net::TcpStream as Blocking,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use tokio::runtime::Builder;

use super::*;

/// What a victim asks, and how often.
const ASKED: usize = 200;
const PAUSE: Duration = Duration::from_millis(5);
const LIMIT: Duration = Duration::from_secs(30);
/// The adversary's connections, and requests in each of its writes.
const CONNECTIONS: usize = 150;
const PIPELINED: usize = 500;
const WORK: &[u8] = b"GET /work HTTP/1.1\r\nHost: x\r\n\r\n";

/// A node's agent on a runtime of its own, so that who asks does not wait for it but by its answers.
struct Node {
    fixture: Fixture,
    _runtime: tokio::runtime::Runtime,
}

impl Node {
    /// With a listener for each of two pods.
    fn start(config: Config) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .event_interval(EVENT_INTERVAL)
            .enable_all()
            .build()
            .unwrap();
        let pods: Vec<Arc<dyn ClientResolver>> = vec![Arc::new(OnePod(1)), Arc::new(OnePod(2))];
        let fixture = runtime.block_on(Fixture::start(config, pods));
        Self { fixture, _runtime: runtime }
    }

    fn connect(&self, pod: usize) -> Blocking {
        let stream = Blocking::connect(self.fixture.addresses[pod]).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// How long each of the victim's requests took, the shortest first.
    fn victim(&self) -> Vec<Duration> {
        use std::io::{Read as _, Write as _};
        let mut took: Vec<_> = (0..ASKED)
            .map(|_| {
                thread::sleep(PAUSE);
                let begun = Instant::now();
                let mut stream = self.connect(1);
                let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
                stream.write_all(request).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert!(answer.contains("200 OK"), "{answer}");
                begun.elapsed()
            })
            .collect();
        took.sort_unstable();
        took
    }

    /// Holds connections, and sends as many requests as fit into each until `stop`; what is answered, `reads` or not. On one
    /// thread, that sleeps: what slows a victim is not that the adversary uses the processor.
    fn flood(&self, reads: bool, stop: &AtomicBool) {
        use std::io::{ErrorKind::WouldBlock, Read as _, Write as _};
        let (requests, mut buffer) = (WORK.repeat(PIPELINED), vec![0; 1 << 16]);
        let connect = || {
            let stream = self.connect(0);
            stream.set_nonblocking(true).unwrap();
            stream
        };
        let mut streams: Vec<_> = (0..CONNECTIONS).map(|_| connect()).collect();
        while !stop.load(Ordering::Relaxed) {
            for stream in &mut streams {
                // What was begun is not always finished, and the rest of it no request: that is its own loss.
                let mut ends =
                    stream.write(&requests).is_err_and(|error| error.kind() != WouldBlock);
                while reads && !ends {
                    match stream.read(&mut buffer) {
                        Ok(length) => ends = length == 0,
                        Err(error) if error.kind() == WouldBlock => break,
                        Err(_) => ends = true,
                    }
                }
                if ends {
                    *stream = connect();
                }
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// How long the victim's requests took, 50, 90 and 99 % of them, without and with a flood.
    fn slowed(&self, reads: bool) -> [(Duration, Duration); 3] {
        let control = self.victim();
        let stop = AtomicBool::new(false);
        let took = thread::scope(|scope| {
            scope.spawn(|| self.flood(reads, &stop));
            let took = self.victim();
            // Until it has got beyond its share, where it has one.
            let begun = Instant::now();
            while !reads && self.rejected("Requests") == 0 && begun.elapsed() < LIMIT {
                thread::sleep(PAUSE);
            }
            stop.store(true, Ordering::Relaxed);
            took
        });
        let shown = [50, 90, 99].map(|n| (percentile(&control, n), percentile(&took, n)));
        println!(
            "p50, p90, p99 without and with: {shown:?}; {} rejected",
            self.rejected("Requests")
        );
        shown
    }

    /// One round of three is within `bounds`: a busy machine disturbs a round, and an adversary that slows others all of them.
    fn slows_nobody(&self, reads: bool, bounds: impl Fn(&[(Duration, Duration); 3]) -> bool) {
        assert!((0..3).any(|_| bounds(&self.slowed(reads))), "each of three rounds");
    }

    fn rejected(&self, reason: &str) -> u64 {
        let line = format!("kiam_serve_rejected_total{{reason=\"{reason}\"}} ");
        let metrics = self.fixture.metrics();
        let count = metrics.lines().find_map(|text| text.strip_prefix(&line));
        count.map_or(0, |count| count.parse().unwrap())
    }
}

fn percentile(took: &[Duration], percent: usize) -> Duration {
    took[(took.len() * percent / 100).min(took.len() - 1)]
}

#[test]
fn a_pod_that_pipelines_and_never_reads_does_not_slow_another() {
    let node = Node::start(Config::default());
    node.slows_nobody(false, |shown| {
        shown.iter().all(|&(without, with)| with < without * 5 + Duration::from_millis(25))
    });
    assert!(node.rejected("Requests") > 0, "{}", node.fixture.metrics());
}

#[test]
fn a_share_is_spent_in_turns_so_that_even_a_burst_slows_nobody() {
    // More than it can ask: what keeps it from slowing others is its turn alone.
    let requests = Rate::per_second(1_000_000, 1_000_000);
    let node = Node::start(Config { requests, ..Config::default() });
    // A request or two of the adversary before each step of the victim's, and not one of each of its connections.
    node.slows_nobody(true, |&[(without, with), ..]| {
        with < without * 5 + Duration::from_millis(20)
    });
}

#[tokio::test]
async fn requests_beyond_the_share_get_503_and_end_the_connection() {
    let captured = CapturedLogs::start(tracing::Level::WARN);
    let requests = Rate::per_second(1, 20);
    let config = Config { requests, ..Config::default() };
    let node = Fixture::start(config, vec![Arc::new(OnePod(1)), Arc::new(OnePod(2))]).await;
    let mut kept = node.connect_to(0, 1).await;
    for _ in 0..20 {
        assert!(ask(&mut kept).await.contains("200 OK"));
    }
    for stream in [&mut kept, &mut node.connect_to(0, 1).await] {
        let _ = stream.write_all(GET).await;
        let answer = to_end(stream).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503"), "{answer}");
        for field in ["retry-after: 1", "connection: close", "content-length: 0"] {
            assert!(head.contains(field), "{field}: {answer}");
        }
        assert!(body.is_empty(), "{answer}");
    }
    assert!(ask(&mut node.connect_to(1, 1).await).await.contains("200 OK"), "another pod's share");
    let metrics = node.metrics();
    assert!(metrics.contains("rejected_total{reason=\"Requests\"} 2"), "{metrics}");
    let lines = captured.lines_with("Too many requests");
    assert!(lines.len() == 1 && lines[0].contains(&Pod::test(1).name), "{lines:?}");
    // What is not used comes back.
    let begun = Instant::now();
    while !ask(&mut node.connect_to(0, 1).await).await.contains("200 OK") {
        assert!(begun.elapsed() < Duration::from_secs(10));
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_request_that_is_held_keeps_no_other_of_its_pod_but_those_behind_it() {
    let node = Fixture::with(Config::default()).await;
    let mut held = node.held(0, 2).await;
    held.write_all(&GET.repeat(10)).await.unwrap();
    for _ in 0..10 {
        assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
    }
    let behind = timeout(Duration::from_millis(100), held.read(&mut [0; 16])).await;
    assert!(behind.is_err(), "one answer in work for each connection: {behind:?}");
}

#[tokio::test]
async fn a_pod_that_forgets_connections_is_still_served_and_keeps_those_it_uses() {
    let config = Config { connections_per_pod: 4, ..Config::default() };
    let node = Fixture::with(config).await;
    let mut held = node.held(0, 2).await;
    let mut oldest = node.connect(2).await;
    let mut silent = node.connect(2).await;
    let mut used = node.connect(2).await;
    for stream in [&mut oldest, &mut used] {
        assert!(ask(stream).await.contains("200 OK"));
    }
    let mut new = node.connect(2).await;
    assert!(ask(&mut new).await.contains("200 OK"));
    assert_eq!(read(&mut silent).await, "", "idle since it came");
    assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
    assert_eq!(read(&mut oldest).await, "", "idle since its answer");
    assert!(ask(&mut used).await.contains("200 OK"));
    assert!(ask(&mut new).await.contains("200 OK"));
    let waits = timeout(Duration::from_millis(100), held.read(&mut [0; 16])).await;
    assert!(waits.is_err(), "its request is in work: {waits:?}");
    let metrics = node.metrics();
    assert!(metrics.contains("rejected_total{reason=\"IdleConnections\"} 2"), "{metrics}");
}

#[tokio::test]
async fn connections_that_come_too_fast_are_closed_at_the_node_and_wait_inside_the_pod() {
    let new_connections = Rate::per_second(10, 5);
    let config = Config { new_connections, ..Config::default() };
    let node = Fixture::start(config, vec![Arc::new(OnePod(1)), Arc::new(OnePod(2))]).await;
    let mut answered = 0;
    for _ in 0..20 {
        answered += usize::from(ask(&mut node.connect_to(0, 1).await).await.contains("200 OK"));
    }
    assert!((5..15).contains(&answered), "{answered}");
    assert!(node.metrics().contains("rejected_total{reason=\"NewConnections\"}"));
    assert!(ask(&mut node.connect_to(1, 1).await).await.contains("200 OK"), "another pod");

    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let inside = Listener { pod: Some(uid(3)), ..Listener::new(socket, Arc::new(OnePod(3))) };
    node.sender.send(inside).await.unwrap();
    let begun = Instant::now();
    for _ in 0..10 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut stream).await.contains("200 OK"));
    }
    assert!(begun.elapsed() > Duration::from_millis(400), "{:?}", begun.elapsed());
}

/// What the kernel holds for a connection that sends and never reads, as far as its own end can tell: bytes that it could
/// send before nothing more was taken.
async fn taken_unread(node: &Fixture) -> usize {
    let stream = node.connect(2).await;
    let requests = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100);
    let mut taken = 0;
    let settled = Duration::from_millis(500);
    while timeout(settled, stream.writable()).await.is_ok() {
        match stream.try_write(&requests) {
            Ok(length) => taken += length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
    taken
}

#[tokio::test]
async fn what_a_connection_leaves_unread_costs_the_agent_little() {
    let node = Fixture::with(Config::default()).await;
    // Served from now on.
    assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
    let taken = taken_unread(&node).await;
    println!("{taken} bytes taken");
    // Its own buffer, the agent's, and what hyper has read of the next head.
    assert!(taken < 64 * 1024, "{taken} bytes");
}

#[tokio::test]
async fn long_heads_are_not_slowed_by_small_buffers() {
    let node = Fixture::with(Config::default()).await;
    assert!(ask(&mut node.connect(2).await).await.contains("200 OK"));
    let head = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(15_000));
    let mut stream = TcpStream::connect(node.addresses[0]).await.unwrap();
    let mut took = Vec::new();
    for _ in 0..50 {
        let begun = Instant::now();
        stream.write_all(head.as_bytes()).await.unwrap();
        assert!(read(&mut stream).await.contains("200 OK"));
        took.push(begun.elapsed());
    }
    took.sort_unstable();
    println!("p50 {:?}, the longest {:?}", took[25], took[49]);
    // A segment that finds no room is sent again after 200 ms.
    assert!(took[25] < Duration::from_millis(100), "{took:?}");
}
