//! What was allowed is taken back while pods ask as fast as they can.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::time::Instant;

use super::fixture::{Identity, LIST, Node, config, namespace, pod};
use kiam_core::pods::{Namespace, Pod};

const CLIENTS: usize = 6;
const ROUNDS: u64 = 60;
/// Longer than a slow machine takes.
const LIMIT: Duration = Duration::from_secs(60);
/// The meaning of a phase, by its remainder: between the other two it is not certain what the agent knows.
const PHASES: u64 = 4;
const FORBIDDEN: u64 = 1;
const ALLOWED: u64 = 3;

/// What the clients share: the phase, and how many answers they had within it.
#[derive(Debug, Default)]
struct Course {
    phase: AtomicU64,
    answers: AtomicU64,
}

/// Requests that were sent and answered within one phase.
#[derive(Debug, Default)]
struct Tally {
    allowed: u64,
    allowed_while_forbidden: u64,
    refused_while_forbidden: u64,
}

impl Course {
    /// Waits until each client may have had an answer in this phase.
    fn answered(&self) {
        let (begun, before) = (Instant::now(), self.answers.load(Ordering::SeqCst));
        while self.answers.load(Ordering::SeqCst) < before + 2 * CLIENTS as u64 {
            assert!(begun.elapsed() < LIMIT, "nobody is answered");
            thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Asks on one connection until the agent or the test closes it.
fn ask(mut stream: TcpStream, path: &str, course: &Course) -> Tally {
    let request = format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    let (mut tally, mut answer) = (Tally::default(), Vec::new());
    loop {
        let before = course.phase.load(Ordering::SeqCst);
        let Some(status) = exchange(&mut stream, request.as_bytes(), &mut answer) else {
            return tally;
        };
        let certain = course.phase.load(Ordering::SeqCst) == before;
        course.answers.fetch_add(u64::from(certain), Ordering::SeqCst);
        match (certain, before % PHASES, status) {
            (true, FORBIDDEN, 200) => tally.allowed_while_forbidden += 1,
            (true, FORBIDDEN, _) => tally.refused_while_forbidden += 1,
            (true, ALLOWED, 200) => tally.allowed += 1,
            _ => {}
        }
    }
}

/// The status of one answer, which is read whole.
fn exchange(stream: &mut TcpStream, request: &[u8], answer: &mut Vec<u8>) -> Option<u16> {
    stream.write_all(request).ok()?;
    answer.clear();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(answer);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
            if body.len() >= length.parse().ok()? {
                return head.split(' ').nth(1)?.parse().ok();
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
        }
    }
}

/// A connection of pod 2.
async fn connect(node: &Node) -> TcpStream {
    let stream = node.connect(2).await.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

/// What takes the role back, and what gives it again.
fn change(node: &Node, round: u64, allowed: bool) {
    let version = Some(10 * round + if allowed { 5 } else { 1 });
    let pod = |role| node.index.apply(Pod { resource_version: version, ..pod(2, role) });
    let namespace = |permitted| {
        node.index
            .apply(Namespace { resource_version: version, ..namespace("default", permitted) });
    };
    match (round % 4, allowed) {
        (0, false) => pod(None),
        (1, false) => pod(Some("team/writer")),
        (2, false) => namespace(Some(".*role/nobody")),
        (_, false) => {
            node.index
                .delete(&Namespace { resource_version: version, ..Namespace::new("default") });
        }
        (0 | 1, true) => pod(Some("reader")),
        (_, true) => namespace(None),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_given_by_a_decision_whose_records_have_changed() {
    let config = super::Config { hold: Duration::from_millis(1), ..config() };
    let node = Node::usual(config, Identity::Kernel).await;
    let course = Arc::new(Course::default());
    course.phase.store(ALLOWED, Ordering::SeqCst);
    let mut streams = Vec::new();
    for _ in 0..CLIENTS {
        streams.push(connect(&node).await);
    }
    let path = format!("{LIST}reader");
    let clients: Vec<_> = streams
        .iter()
        .map(|stream| {
            let (stream, course) = (stream.try_clone().unwrap(), course.clone());
            let path = path.clone();
            thread::spawn(move || ask(stream, &path, &course))
        })
        .collect();
    tokio::task::block_in_place(|| {
        for round in 1..=ROUNDS {
            for allowed in [false, true] {
                course.answered();
                course.phase.fetch_add(1, Ordering::SeqCst);
                change(&node, round, allowed);
                course.phase.fetch_add(1, Ordering::SeqCst);
            }
        }
        course.answered();
    });
    let mut all = Tally::default();
    streams.iter().for_each(|stream| stream.shutdown(Shutdown::Both).unwrap());
    for client in clients {
        let tally = tokio::task::block_in_place(|| client.join().unwrap());
        all.allowed += tally.allowed;
        all.allowed_while_forbidden += tally.allowed_while_forbidden;
        all.refused_while_forbidden += tally.refused_while_forbidden;
    }
    assert_eq!(all.allowed_while_forbidden, 0, "{all:?}");
    assert!(all.refused_while_forbidden > ROUNDS && all.allowed > ROUNDS, "{all:?}");
}
