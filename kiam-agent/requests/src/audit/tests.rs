//! Shares of lines, files that are rotated, and what a line shows.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::{Duration, SystemTime},
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    Metrics, Recorder,
    file::RotatedFile,
    hand_out::{self, HandOut},
    inspect,
    inspector::Inspector,
    line::line,
    shares::{Entry, Shares},
};
use kiam_core::{
    blocking::Blocking,
    clock::Clock,
    pods::{
        CallingProcess, Comm, ContainerId, Executable, Inspection, Opener, Pod, PodIndex, Relative,
    },
};

/// Longer than a slow machine takes.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a test waits for what takes a second at most: less than a test runner waits for the test.
const WAIT: Duration = Duration::from_secs(20);

fn comm(text: &[u8]) -> Comm {
    let mut bytes = [0; 16];
    bytes[..text.len()].copy_from_slice(text);
    Comm::new(bytes)
}

/// A hand-out of `key` to the process `pid` of pod `n`, on the connection `socket`.
fn hand_out(n: u32, pid: u32, socket: u64, key: &str) -> HandOut {
    let pod = Arc::new(Pod::test(n));
    let container = ContainerId::from_cgroup_path(format!("pod{}/c", pod.uid).as_ref());
    let connected = Duration::ZERO;
    let process = Some(CallingProcess { pid, thread: pid, connected, comm: comm(b"aws") });
    HandOut {
        time: SystemTime::UNIX_EPOCH,
        pod,
        opener: Some(Arc::new(Opener { socket, container, process, inspection: OnceLock::new() })),
        access_key_id: key.into(),
        role: "arn:aws:iam::123456789012:role/reader".parse().unwrap(),
        session_name: "kiam-kiam".parse().unwrap(),
        expires: SystemTime::UNIX_EPOCH + Duration::from_secs(3600),
        path: hand_out::Path::PodLocal,
        has_token: true,
        user_agent: None,
        unusual: Default::default(),
    }
}

/// What a pod's hand-outs came to.
#[derive(Default)]
struct Written {
    lines: Vec<Entry>,
    dropped: u64,
}

impl Written {
    fn add(&mut self, admitted: Result<Option<Entry>, u64>) {
        match admitted {
            Ok(entry) => self.lines.extend(entry),
            Err(dropped) => self.dropped += dropped,
        }
    }

    /// What a writer that keeps up leaves of the entries: their counts, by process.
    fn counts(&mut self) -> HashMap<u32, u64> {
        let mut counts = HashMap::new();
        for entry in self.lines.drain(..) {
            *counts.entry(entry.hand_out.process().unwrap().pid).or_default() += entry.count;
        }
        counts
    }
}

fn ask(shares: &Shares, asked: HandOut) -> Result<Option<Entry>, u64> {
    match shares.is_repeat(&asked.pod.uid, asked.socket(), &asked.access_key_id) {
        true => Ok(None),
        false => shares.admit(Arc::new(asked), Instant::now()),
    }
}

fn flush(shares: &Shares, written: &mut Written) {
    shares.flush().into_iter().for_each(|entry| written.add(entry));
}

#[tokio::test(start_paused = true)]
async fn repeats_on_a_connection_are_counted_and_another_key_is_a_line() {
    let (shares, mut written) = (Shares::default(), Written::default());
    for _ in 0..1000 {
        written.add(ask(&shares, hand_out(1, 7, 1, "ASIAONE")));
    }
    assert_eq!(written.lines.len(), 1);
    written.add(ask(&shares, hand_out(1, 7, 1, "ASIATWO")));
    written.add(ask(&shares, hand_out(1, 7, 2, "ASIATWO")));
    assert_eq!(written.lines.len(), 3);
    flush(&shares, &mut written);
    let shown: Vec<_> = written
        .lines
        .iter()
        .map(|it| (&*it.hand_out.access_key_id, it.hand_out.socket(), it.count, it.coalesced))
        .collect();
    assert_eq!(
        shown,
        [
            ("ASIAONE", 1, 1, false),
            ("ASIATWO", 1, 1, false),
            ("ASIATWO", 2, 1, false),
            ("ASIAONE", 1, 999, true)
        ]
    );
    // A connection that asks again later has a line again.
    written.lines.clear();
    flush(&shares, &mut written);
    written.add(ask(&shares, hand_out(1, 7, 1, "ASIATWO")));
    assert_eq!(written.lines.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_floods_is_counted_by_process_and_takes_no_line_of_another() {
    let (shares, mut written) = (Shares::default(), Written::default());
    for socket in 0..10_000 {
        written.add(ask(&shares, hand_out(1, 7, socket, "ASIAONE")));
    }
    assert_eq!((written.lines.len(), written.dropped), (60, 0));
    written.add(ask(&shares, hand_out(2, 8, 99_999, "ASIATWO")));
    assert_eq!(written.lines.len(), 61, "the other pod's line");
    // Places are free again once lines are written.
    let before = written.counts();
    flush(&shares, &mut written);
    assert_eq!(written.lines.len(), 1);
    let after = written.counts();
    assert_eq!((before[&7] + after[&7], before[&8]), (10_000, 1));
    // As many processes as it likes: what no line stands for is counted.
    for n in 0..10_000 {
        written.add(ask(&shares, hand_out(1, n, u64::from(n) + 100_000, "ASIAONE")));
    }
    flush(&shares, &mut written);
    assert!(written.lines.len() <= 17, "{}", written.lines.len());
    let counted: u64 = written.counts().values().sum();
    assert_eq!(counted + written.dropped, 10_000);
    tokio::time::advance(Duration::from_secs(60)).await;
    written.add(ask(&shares, hand_out(1, 7, 1_000_000, "ASIAONE")));
    assert_eq!(written.lines.len(), 1, "the share comes back");
}

#[tokio::test(start_paused = true)]
async fn lines_that_are_not_written_hold_their_pods_places() {
    let (shares, mut written) = (Shares::default(), Written::default());
    for second in 0..600 {
        written.add(ask(&shares, hand_out(1, 7, second, "ASIAONE")));
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    // The writer has stopped: these are as many as the pod may have in the queues.
    assert_eq!(written.lines.len(), 64);
    flush(&shares, &mut written);
    assert_eq!((written.lines.len(), written.dropped), (64, 600 - 64));
    written.lines.clear();
    written.add(ask(&shares, hand_out(1, 7, 1_000, "ASIAONE")));
    assert_eq!(written.lines.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn pods_that_ask_no_more_are_forgotten() {
    let shares = Shares::default();
    for n in 0..1000 {
        let _ = ask(&shares, hand_out(n, 7, 1, "ASIAONE"));
    }
    tokio::time::advance(Duration::from_secs(60)).await;
    shares.flush();
    shares.flush();
    assert_eq!(shares.pods(), 0);
}

/// The line of `hand_out`, of which `/proc` said `inspection`.
fn text(hand_out: HandOut, inspection: Inspection) -> Vec<u8> {
    hand_out.opener.as_ref().unwrap().inspection.set(inspection).unwrap();
    let shares = Shares::default();
    let entry = shares.admit(Arc::new(hand_out), Instant::now()).ok().flatten().unwrap();
    line(&entry)
}

#[tokio::test]
async fn any_name_makes_one_short_line_of_ascii() {
    let evil = b"\"}\n{\"audit\":\"x\x1b[2J\xff\\".repeat(1000);
    let mut asked = hand_out(1, 7, 1, "ASIAONE");
    let process = CallingProcess { comm: comm(&evil[..16]), ..*asked.process().unwrap() };
    let below = [b"burstable/pod0f8fad5b-d9cb-469f-a165-70867728950e/".as_slice(), &evil].concat();
    let below = String::from_utf8_lossy(&below).into_owned();
    let container = ContainerId::from_cgroup_path(Path::new(&below));
    let (process, inspection) = (Some(process), OnceLock::new());
    asked.opener = Some(Arc::new(Opener { socket: 1, container, process, inspection }));
    asked.user_agent = Some(hand_out::escaped(&evil, 128));
    let parent =
        Relative { pid: 1, comm: evil.clone(), executable: Some(evil.clone()), is_first: false };
    let inspection =
        Inspection { executable: Executable::Running(evil.clone()), parent: Some(parent) };
    let text = text(asked, inspection);
    assert!(text.len() < 4096, "a pipe takes it whole: {}", text.len());
    assert_eq!(text.iter().position(|byte| !(b' '..=b'~').contains(byte)), Some(text.len() - 1));
    let line: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(line["audit"], "credentials");
    assert_eq!(line["process"]["comm"], r#"\"}\n{\"audit\":\"x\x1b["#);
    assert!(line["process"]["executable"].as_str().unwrap().ends_with("..."));
}

#[tokio::test]
async fn the_longest_line_is_one_that_a_pipe_takes_whole() {
    // Each of them takes four bytes.
    let evil = b"\"".repeat(4096);
    let mut asked = hand_out(1, 7, 1, "ASIAONE");
    let name = |length| "n".repeat(length);
    asked.pod = Arc::new(Pod { namespace: name(63), name: name(253), ..Pod::test(1) });
    let role = format!("arn:aws-us-gov:iam::123456789012:role/{}/{}", name(510), name(64));
    (asked.role, asked.session_name) = (role.parse().unwrap(), name(64).parse().unwrap());
    let below = format!("pod{}/{}", asked.pod.uid, "\"".repeat(250));
    let container = ContainerId::from_cgroup_path(below.as_ref());
    assert!(container.is_some());
    let process = CallingProcess {
        pid: u32::MAX,
        thread: u32::MAX,
        comm: comm(&evil[..16]),
        ..*asked.process().unwrap()
    };
    let (socket, process, inspection) = (u64::MAX, Some(process), OnceLock::new());
    asked.opener = Some(Arc::new(Opener { socket, container, process, inspection }));
    asked.user_agent = Some(hand_out::escaped(&evil, 128));
    let parent = Relative {
        pid: u32::MAX,
        comm: evil.clone(),
        executable: Some(evil.clone()),
        is_first: false,
    };
    let inspection = Inspection { executable: Executable::Running(evil), parent: Some(parent) };
    let text = text(asked, inspection);
    assert!(text.len() < 4096, "{}", text.len());
}

#[test]
fn full_queues_cost_lines_and_hold_nobody_up() {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let (entries, received) = sync_channel(2);
    let (lines, written) = sync_channel(1);
    let (shares, pending) = (Shares::default(), Arc::<AtomicUsize>::default());
    let (counts, clock) = (metrics.clone(), Clock::system());
    let recorder = Recorder { shares, entries, pending: pending.clone(), clock, metrics };
    let (_index, pods) = PodIndex::new();
    let (ended, end) = sync_channel(1);
    thread::spawn(move || {
        for socket in 0..3 {
            let asked = Arc::new(hand_out(1, 7, socket, "ASIAONE"));
            recorder.send(recorder.shares.admit(asked, Instant::now()));
        }
        drop(recorder);
        let (inspector, blocking) =
            (Inspector::new(pods, LIMIT, counts), Blocking::here().unwrap());
        inspect(inspector, &received, &lines, &pending, &blocking);
        ended.send(pending.load(Ordering::Relaxed)).unwrap();
    });
    // Of three entries two have room, and of their lines one.
    assert_eq!(end.recv_timeout(WAIT).expect("nothing waits for room"), 1);
    assert_eq!(written.try_iter().count(), 1);
    let mut shown = String::new();
    encode(&mut shown, &registry).unwrap();
    assert!(shown.contains("kiam_audit_dropped_total{reason=\"Queue\"} 2\n"), "{shown}");
}

#[tokio::test]
async fn a_process_that_is_gone_has_no_program() {
    let gone = Inspection { executable: Executable::Gone, parent: None };
    let line: Value = serde_json::from_slice(&text(hand_out(1, 7, 1, "ASIAONE"), gone)).unwrap();
    let process = &line["process"];
    assert_eq!((&process["comm"], &process["pid"]), (&"aws".into(), &7.into()));
    assert_eq!(
        (&process["executable"], &process["executable_state"], &line["parent"]),
        (&Value::Null, &"gone".into(), &Value::Null)
    );
}

/// The sizes of the files in `folder`, by name.
fn sizes(folder: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut sizes: Vec<_> = entries
        .map(|it| (it.file_name().into_string().unwrap(), it.metadata().unwrap().len()))
        .collect();
    sizes.sort();
    sizes
}

#[test]
fn files_are_rotated_and_never_take_more_than_their_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made/audit.log");
    let mut file = RotatedFile::new(path.clone(), 4000);
    // Another agent, as in a takeover.
    let mut other = RotatedFile::new(path.clone(), 4000);
    for number in 0..200 {
        let writer = if number % 3 == 0 { &mut other } else { &mut file };
        writer.write(format!("{number:099}\n").as_bytes()).unwrap();
        let sizes = sizes(path.parent().unwrap());
        assert!(sizes.iter().all(|(_, size)| *size <= 1000), "{sizes:?}");
        assert!(sizes.len() <= 4, "{sizes:?}");
    }
    let names = ["audit.log.3", "audit.log.2", "audit.log.1", "audit.log"];
    let read = |name| fs::read_to_string(path.with_file_name(name)).unwrap();
    let numbers: Vec<u32> = names
        .into_iter()
        .map(read)
        .collect::<String>()
        .lines()
        .map(|it| it.parse().unwrap())
        .collect();
    assert_eq!(numbers, (160..200).collect::<Vec<_>>(), "in order, and the last ones");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    // Removed or rotated by others, it is made again.
    fs::remove_file(&path).unwrap();
    file.write(b"again\n").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"again\n");
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    assert!(file.write(b"lost\n").is_err() || path.exists());
    file.write(b"again\n").unwrap();
    assert!(fs::read_to_string(&path).unwrap().ends_with("again\n"));
}

#[test]
fn a_size_that_was_lowered_holds_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let total = || sizes(folder.path()).iter().map(|(_, size)| size).sum::<u64>();
    let lines = |file: &mut RotatedFile| {
        (0..100).for_each(|n| file.write(format!("{n:099}\n").as_bytes()).unwrap());
    };
    lines(&mut RotatedFile::new(path.clone(), 8000));
    assert!(total() > 6000);
    let mut smaller = RotatedFile::new(path.clone(), 4400);
    smaller.shrink().unwrap();
    let kept = total();
    assert!((1000..=4400).contains(&kept), "{kept}: the newest stay");
    assert!(fs::read_to_string(path.with_extension("log.1")).unwrap().ends_with("99\n"));
    for n in 0..100 {
        smaller.write(format!("{n:099}\n").as_bytes()).unwrap();
        assert!(total() <= 4400, "{:?}", sizes(folder.path()));
    }
    // A single file may be larger than all of them may be.
    fs::write(&path, "x".repeat(9000)).unwrap();
    RotatedFile::new(path.clone(), 4400).shrink().unwrap();
    assert!(total() <= 4400, "{:?}", sizes(folder.path()));
    // What is smaller stays as it is.
    lines(&mut smaller);
    let before = sizes(folder.path());
    RotatedFile::new(path.clone(), 4400).shrink().unwrap();
    RotatedFile::new(path, 8000).shrink().unwrap();
    assert_eq!(sizes(folder.path()), before);
}

#[test]
fn a_lock_that_another_process_keeps_costs_one_wait_and_the_rotation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let mut file = RotatedFile::new(path.clone(), 4 * 100);
    file.write(b"first\n").unwrap();
    let foreign = fs::File::open(&path).unwrap();
    rustix::fs::flock(&foreign, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (tried, outcome) = sync_channel(1);
    let writes = thread::spawn(move || {
        file.write(b"kept\n").unwrap();
        let begun = Instant::now();
        for _ in 0..10 {
            file.write(b"kept\n").unwrap();
        }
        let error = file.write(&[b'x'; 60]).unwrap_err().to_string();
        tried.send((error, begun.elapsed())).unwrap();
        file
    });
    let (error, took) = outcome.recv_timeout(WAIT).expect("the wait for the lock ends");
    for part in [path.to_str().unwrap(), "another process holds its lock", "lslocks"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(took < WAIT / 2, "only the first line waits: {took:?}");
    drop(foreign);
    writes.join().unwrap().write(&[b'y'; 60]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [b'y'; 60]);
    let older = fs::read_to_string(folder.path().join("audit.log.1")).unwrap();
    assert_eq!(older, format!("first\n{}", "kept\n".repeat(11)));
}

#[test]
fn what_others_may_have_put_there_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let write = |path: &Path| RotatedFile::new(path.to_owned(), 4000).write(b"line\n");
    let victim = folder.path().join("victim");
    fs::write(&victim, "").unwrap();
    let link = folder.path().join("link");
    symlink(&victim, &link).unwrap();
    write(&link).unwrap_err();
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    write(&fifo).unwrap_err();
    write(folder.path()).unwrap_err();
    let open = folder.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    write(&open.join("audit.log")).unwrap_err();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    write(&open.join("audit.log")).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"");
}
