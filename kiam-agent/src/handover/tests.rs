//! Both ends, over a real socket.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    os::unix::{fs::PermissionsExt as _, net::UnixStream as Std},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    task::JoinHandle,
    time::timeout,
};

use super::*;
use kiam_core::lifecycle::{self, DrainSignal};

const PATIENCE: Duration = Duration::from_secs(10);

struct Predecessor {
    folder: TempDir,
    pods: SocketAddr,
    abandoned: Arc<AtomicU32>,
    leaving: Arc<AtomicBool>,
    signal: DrainSignal,
    ended: JoinHandle<OfferEnd>,
}

fn everybody() -> PeerJudge {
    PeerJudge::new(|_, _| true)
}

fn peers(folder: &TempDir, trusted: PeerJudge) -> Peers {
    Peers { state_dir: folder.path().to_owned(), trusted }
}

fn stand(folder: TempDir, trusted: PeerJudge) -> Predecessor {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pods = listener.local_addr().unwrap();
    let abandoned = Arc::new(AtomicU32::new(0));
    let (signal, drain) = lifecycle::drain();
    let count = abandoned.clone();
    let leaving = Arc::new(AtomicBool::new(false));
    let leaves = leaving.clone();
    let abandon = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let offer = Offer::bind(folder.path()).unwrap();
    let listener = OwnedFd::from(listener);
    let assets = HandoverContent {
        sockets: Box::new(move || Ok(vec![listener.try_clone()?])),
        credentials: Box::new(|| b"what is held".to_vec().into()),
        stays: Box::new(move || !leaves.load(Ordering::Relaxed)),
    };
    let ended = tokio::spawn(offer.stand(assets, trusted, abandon, drain));
    Predecessor { folder, pods, abandoned, leaving, signal, ended }
}

async fn given(folder: &TempDir) -> Handover {
    match peers(folder, everybody()).ask().await {
        HandoverAnswer::Sockets(handover) => handover,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn successor_gets_the_same_sockets_and_supersedes() {
    let predecessor = stand(tempfile::tempdir().unwrap(), everybody());
    let path = predecessor.folder.path().join(SOCKET);
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut handover = given(&predecessor.folder).await;
    assert!(handover.take("127.0.0.1:1".parse().unwrap()).is_none());
    let socket = handover.take(predecessor.pods).unwrap();
    assert!(handover.is_awaited() && !predecessor.ended.is_finished());
    assert!(handover.taken().await);
    assert_eq!(
        timeout(PATIENCE, predecessor.ended).await.unwrap().unwrap(),
        OfferEnd::Taken { queue: true }
    );
    // The predecessor's end of the socket is closed, and what connects now waits in the same queue.
    let _client = std::net::TcpStream::connect(predecessor.pods).unwrap();
    socket.accept().unwrap();
}

#[tokio::test]
async fn successor_gets_what_is_held_and_the_predecessor_goes_on() {
    let predecessor = stand(tempfile::tempdir().unwrap(), everybody());
    for _ in 0..3 {
        let held = peers(&predecessor.folder, everybody()).sealed_credentials().await;
        assert_eq!(held.as_ref().map(|held| held.as_slice()), Some(&b"what is held"[..]));
    }
    assert!(!predecessor.ended.is_finished());
    assert_eq!(predecessor.abandoned.load(Ordering::Relaxed), 0);
    assert!(given(&predecessor.folder).await.taken().await);
    let nobody = tempfile::tempdir().unwrap();
    assert!(peers(&nobody, everybody()).sealed_credentials().await.is_none());
}

#[tokio::test]
async fn what_is_not_sealed_or_not_asked_for_is_not_taken_for_credentials() {
    let sealed = || sealed::seal(b"{}").unwrap();
    let odd: [fn() -> Vec<OwnedFd>; 4] = [
        Vec::new,
        || vec![tempfile::tempfile().unwrap().into()],
        || vec![TcpListener::bind("127.0.0.1:0").unwrap().into()],
        || vec![sealed::seal(b"{}").unwrap(), sealed::seal(b"{}").unwrap()],
    ];
    for (given, good) in odd.into_iter().map(|odd| (odd(), false)).chain([(vec![sealed()], true)]) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(SOCKET)).unwrap();
        let answer = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; message::CREDENTIALS.len()];
            stream.read_exact(&mut request).await.unwrap();
            message::send(&stream, &given).await.unwrap();
        };
        let peers = peers(&folder, everybody());
        let (held, ()) = tokio::join!(peers.sealed_credentials(), answer);
        assert_eq!(held.is_some(), good);
    }
}

#[tokio::test]
async fn successor_that_dies_is_forgotten_and_the_next_one_served() {
    let predecessor = stand(tempfile::tempdir().unwrap(), everybody());
    assert!(peers(&predecessor.folder, everybody()).is_served().await);
    // One that ends soon is not waited for.
    predecessor.leaving.store(true, Ordering::Relaxed);
    assert!(!peers(&predecessor.folder, everybody()).is_served().await);
    drop(given(&predecessor.folder).await);
    let handover = given(&predecessor.folder).await;
    assert_eq!(predecessor.abandoned.load(Ordering::Relaxed), 1);
    assert!(handover.taken().await);
    assert_eq!(
        timeout(PATIENCE, predecessor.ended).await.unwrap().unwrap(),
        OfferEnd::Taken { queue: false }
    );
}

#[tokio::test]
async fn successor_of_an_agent_that_dies_half_way_has_the_sockets() {
    let predecessor = stand(tempfile::tempdir().unwrap(), everybody());
    let mut handover = given(&predecessor.folder).await;
    let socket = handover.take(predecessor.pods).unwrap();
    predecessor.ended.abort();
    assert!(timeout(PATIENCE, predecessor.ended).await.unwrap().is_err());
    assert!(!handover.is_awaited());
    assert!(!handover.taken().await);
    let _client = std::net::TcpStream::connect(predecessor.pods).unwrap();
    socket.accept().unwrap();
}

#[tokio::test]
async fn end_of_the_agent_withdraws_the_offer() {
    let predecessor = stand(tempfile::tempdir().unwrap(), everybody());
    predecessor.signal.start();
    assert_eq!(timeout(PATIENCE, predecessor.ended).await.unwrap().unwrap(), OfferEnd::Withdrawn);
    let answer = peers(&predecessor.folder, everybody()).ask().await;
    assert!(matches!(answer, HandoverAnswer::Nobody), "{answer:?}");
}

#[tokio::test]
async fn agent_that_heard_nothing_finds_out_that_it_is_superseded() {
    let mut predecessor = stand(tempfile::tempdir().unwrap(), everybody());
    // One that listens there and died is no successor.
    drop(Offer::bind(predecessor.folder.path()).unwrap());
    let early = timeout(Duration::from_secs(3), &mut predecessor.ended).await;
    assert!(early.is_err(), "{early:?}");
    drop(given(&predecessor.folder).await);
    let _successor = Offer::bind(predecessor.folder.path()).unwrap();
    assert_eq!(
        timeout(PATIENCE, predecessor.ended).await.unwrap().unwrap(),
        OfferEnd::Taken { queue: false }
    );
}

#[tokio::test]
async fn agent_that_ends_before_it_finds_out_is_superseded_all_the_same() {
    // Which of the two it looks at first is left to chance.
    for _ in 0..20 {
        let predecessor = stand(tempfile::tempdir().unwrap(), everybody());
        let _successor = Offer::bind(predecessor.folder.path()).unwrap();
        predecessor.signal.start();
        assert_eq!(
            timeout(PATIENCE, predecessor.ended).await.unwrap().unwrap(),
            OfferEnd::Taken { queue: false }
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn untrusted_processes_and_other_protocols_get_nothing() {
    let own = std::process::id();
    let nobody = PeerJudge::new(move |_, pid| pid != own);
    let nobody_again = nobody.clone();
    let cases = [
        (nobody, &b"kiam-handover 1\n"[..]),
        (nobody_again, b"kiam-sessions 1\n"),
        (everybody(), b"kiam-handover 9\n"),
    ];
    for (trusted, request) in cases {
        let predecessor = stand(tempfile::tempdir().unwrap(), trusted);
        let mut stream = Std::connect(predecessor.folder.path().join(SOCKET)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may be closed already, or reset, where it did not even read.
        let _ = stream.write_all(request);
        let read = stream.read(&mut [0; 8]).unwrap_or_default();
        assert_eq!(read, 0);
    }
}

#[tokio::test]
async fn agent_that_is_late_once_still_serves() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join(SOCKET)).unwrap();
    let peers = peers(&folder, everybody());
    let asked = peers.is_served();
    let late = async {
        let _first = listener.accept().await.unwrap();
        let (mut second, _) = listener.accept().await.unwrap();
        let mut request = [0; message::PRESENCE.len()];
        second.read_exact(&mut request).await.unwrap();
        second.write_all(&[message::PRESENT]).await.unwrap();
    };
    assert!(tokio::join!(asked, late).0);
}

#[tokio::test]
async fn successor_gives_up_on_an_agent_that_hangs_and_on_one_it_does_not_trust() {
    let folder = tempfile::tempdir().unwrap();
    let _hangs = UnixListener::bind(folder.path().join(SOCKET)).unwrap();
    let answer = peers(&folder, everybody()).ask().await;
    assert!(matches!(&answer, HandoverAnswer::Silent(why) if why.contains("2 s")), "{answer:?}");
    assert!(!peers(&folder, everybody()).is_served().await);
    let none = PeerJudge::new(|_, _| false);
    let answer = peers(&folder, none).ask().await;
    assert!(matches!(&answer, HandoverAnswer::Silent(why) if why.contains("pod")), "{answer:?}");
}
