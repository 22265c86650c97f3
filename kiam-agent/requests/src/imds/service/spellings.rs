//! The corpus of spellings over real sockets: what a pod is answered, and what the real service receives.

use super::{
    fixture::{Identity, Node, config},
    tests::statuses,
};
use crate::imds::{Config, route::corpus};

fn wide_open() -> Config {
    let allow = ["/latest/*", "/latest/meta-data/*", "/latest/dynamic/*"];
    Config { allow_paths: allow.map(|path| path.parse().unwrap()).into(), ..config() }
}

/// The targets that the node's service was asked for since `before` requests, but for tokens of its own.
fn asked(node: &Node, before: usize) -> Vec<String> {
    let heard = node.imds.heard();
    let lines = heard[before..].iter().map(|head| head.lines().next().unwrap().to_owned());
    lines.filter(|line| line != "PUT /latest/api/token HTTP/1.1").collect()
}

/// `method target`, and nothing that could be taken for more than one request.
fn request(method: &str, target: &[u8]) -> Vec<u8> {
    let rest = b" HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n";
    [method.as_bytes(), b" ", target, rest].concat()
}

#[tokio::test]
async fn every_spelling_is_ours_allowed_or_refused() {
    let node = Node::usual(wide_open(), Identity::Kernel).await;
    let mut wrong = Vec::new();
    for spelling in corpus::spellings() {
        for method in ["GET", "HEAD"] {
            let before = node.imds.heard().len();
            let answer = node.raw(2, &request(method, &spelling.target)).await;
            let (found, asked) = (statuses(&answer), asked(&node, before));
            let (status, path) = match &spelling.outcome {
                corpus::Outcome::Ours => ("200", None),
                corpus::Outcome::Status(status) => (status.as_str(), None),
                corpus::Outcome::Upstream(path) => ("200", Some(path)),
            };
            let once = path.is_some_and(|path| corpus::is_kept(path));
            let expected = path.map(|path| format!("GET {path} HTTP/1.1"));
            let good = asked.iter().eq(&expected) || (once && asked.is_empty());
            if found != [status] || !good {
                wrong.push(format!("{method} {spelling}: {found:?}, asked {asked:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Nothing that is shut by default is asked of the real service, however it is written.
#[tokio::test]
async fn by_default_every_spelling_but_of_open_paths_is_refused_with_no_request() {
    let node = Node::usual(Config { allow_paths: Vec::new(), ..config() }, Identity::Kernel).await;
    for spelling in corpus::spellings() {
        let before = node.imds.heard().len();
        node.raw(2, &request("GET", &spelling.target)).await;
        for line in asked(&node, before) {
            assert!(corpus::is_kept(&line) && !line.contains("//"), "{line} of {spelling}");
        }
    }
}

#[tokio::test]
async fn no_mutation_reaches_the_nodes_service_but_as_what_it_is_allowed_to_be() {
    let node = Node::usual(wide_open(), Identity::Kernel).await;
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut forwarded, mut refused) = (0, 0);
    for _ in 0..1500 {
        let target = corpus::mutated(&mut random);
        let before = node.imds.heard().len();
        let answer = node.raw(2, &request("GET", &target)).await;
        let shown = format!("seed {seed}: {:?}: {answer}", String::from_utf8_lossy(&target));
        let found = statuses(&answer);
        for line in asked(&node, before) {
            let path =
                line.strip_prefix("GET /latest/").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
            let path = path.unwrap_or_else(|| panic!("{line} of {shown}"));
            assert!(corpus::may_be_forwarded(path), "{line} of {shown}");
            forwarded += 1;
        }
        // A raw space or line end in the target makes more, or less, than one request of it.
        assert!(!found.is_empty(), "{shown}");
        for status in found {
            assert!(["200", "400", "403", "404", "405"].contains(&status), "{shown}");
            refused += usize::from(status != "200");
        }
    }
    assert!(forwarded > 20 && refused > 500, "seed {seed}: {forwarded} {refused}");
}
