//! Writes a line for each hand-out of credentials: which process of which pod got which access key.
//!
//! Nothing here delays an answer or refuses one. A request counts a repeat, or puts a short record into a bounded queue. One
//! thread reads `/proc` and another writes, so that a full disk or a slow reader of the log costs lines, which are counted.

mod file;
mod hand_out;
mod inspector;
mod line;
mod metrics;
mod shares;
mod unusual;
mod writer;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use http::HeaderValue;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

pub use self::metrics::Metrics;
use self::{
    hand_out::HandOut,
    inspector::Inspector,
    metrics::Loss,
    shares::{Entry, Place, Shares},
    writer::Output,
};
use kiam_core::{
    blocking::Blocking,
    clock::Clock,
    credentials::IssuedCredentials,
    lifecycle::Drain,
    pods::{Client, Opener, Pod, PodReader},
};

/// The entries that wait for the inspecting thread, and the lines that wait to be written. Each pod may have 64 of them.
const QUEUE: usize = 4096;
const WRITES: usize = 1024;
/// How often repeats are written.
const FLUSH: Duration = Duration::from_secs(30);
/// How long connections may repeat requests once the drain has begun, and how long the last lines may take.
const LATE: Duration = Duration::from_millis(600);
const LAST_LINES: Duration = Duration::from_secs(1);

/// The audit's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where lines go.
    pub destination: Destination,
    /// How long after the agent's start every container that uses credentials has asked for them.
    pub settled: Duration,
}

/// Where the audit's lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Nowhere: nothing is recorded.
    Off,
    /// To standard error, among the log's lines.
    Log,
    /// To a file of at most `size` bytes, older files included.
    File {
        /// `--audit-file`.
        path: PathBuf,
        /// `--audit-file-size`.
        size: u64,
    },
}

/// The audit; cheap to clone.
#[derive(Clone, Default)]
pub struct Audit(Option<Arc<Recorder>>);

/// What a hand-out's request says.
#[derive(Clone, Copy, Debug)]
pub struct Requested<'a> {
    /// Whether the request had a session token (IMDSv2).
    pub has_token: bool,
    /// `User-Agent`.
    pub user_agent: Option<&'a HeaderValue>,
}

/// What the inspecting thread does.
enum Work {
    Inspect(Arc<Opener>, Place),
    Write(Entry),
}

struct Recorder {
    shares: Shares,
    entries: SyncSender<Work>,
    /// The entries and lines on their way.
    pending: Arc<AtomicUsize>,
    clock: Clock,
    metrics: Metrics,
}

// === impl Audit ===

impl Audit {
    /// Starts the audit's threads, which end with the process.
    ///
    /// # Errors
    ///
    /// The system gives no thread, or no descriptor.
    pub fn start(
        config: Config,
        pods: PodReader,
        clock: Clock,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let output = match config.destination {
            Destination::Off => return Ok(Self(None)),
            Destination::Log => Output::log()?,
            Destination::File { path, size } => Output::file(path, size),
        };
        let (entries, received) = sync_channel(QUEUE);
        let (lines, written) = sync_channel(WRITES);
        let pending = Arc::<AtomicUsize>::default();
        let inspector = Inspector::new(pods, config.settled, metrics.clone());
        let (done, counts) = (pending.clone(), metrics.clone());
        on_thread("audit", move |blocking| inspect(inspector, &received, &lines, &done, blocking))?;
        let done = pending.clone();
        on_thread("audit-writer", move |_| output.write_all(&written, &done, &counts))?;
        let shares = Shares::default();
        Ok(Self(Some(Arc::new(Recorder { shares, entries, pending, clock, metrics }))))
    }

    /// Has the process of a new connection inspected, as it may end soon after its answer.
    pub fn connected(&self, client: &Client) {
        let (Some(recorder), Some(opener)) = (&self.0, client.opener()) else { return };
        if let (Some(pod), Some(_)) = (client.uid(), &opener.process)
            && let Some(place) = recorder.shares.inspects(pod, Instant::now())
        {
            // Where the queue is full, it is inspected with its line.
            let _ = recorder.entries.try_send(Work::Inspect(opener.clone(), place));
        }
    }

    /// Records that `client`, a process of `pod`, gets `issued`.
    pub fn handed_out(
        &self,
        client: &Client,
        pod: &Arc<Pod>,
        issued: &IssuedCredentials,
        requested: Requested<'_>,
    ) {
        let Some(recorder) = &self.0 else { return };
        let socket = client.opener().map_or(0, |opener| opener.socket);
        let key = &*issued.credentials.access_key_id;
        if !recorder.shares.is_repeat(&pod.uid, socket, key) {
            let now = recorder.clock.now();
            let hand_out = HandOut::new(client, pod.clone(), issued, requested, now);
            let admitted = recorder.shares.admit(Arc::new(hand_out), Instant::now());
            recorder.send(admitted);
        }
    }

    /// Writes repeats from time to time, until the drain begins, and then the last ones.
    pub async fn run(self, mut drain: Drain) {
        let Some(recorder) = self.0 else { return drain.started().await };
        let mut flush = interval(FLUSH);
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = flush.tick() => recorder.flush(),
                () = drain.started() => break,
            }
        }
        sleep(LATE).await;
        recorder.flush();
        let end = Instant::now() + LAST_LINES;
        while recorder.pending.load(Ordering::Relaxed) > 0 && Instant::now() < end {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

// === impl Recorder ===

impl Recorder {
    fn flush(&self) {
        for entry in self.shares.flush() {
            self.send(entry);
        }
    }

    /// Puts an entry into the queue, if there is one. Never waits.
    fn send(&self, admitted: Result<Option<Entry>, u64>) {
        let entry = match admitted {
            Ok(None) => return,
            Ok(Some(entry)) => entry,
            Err(dropped) => return self.metrics.dropped(Loss::Share, dropped),
        };
        self.pending.fetch_add(1, Ordering::Relaxed);
        let count = entry.count;
        if self.entries.try_send(Work::Write(entry)).is_err() {
            self.pending.fetch_sub(1, Ordering::Relaxed);
            self.metrics.dropped(Loss::Queue, count);
        }
    }
}

/// Has `inspector` turn entries into lines, until no more can come.
fn inspect(
    mut inspector: Inspector,
    entries: &Receiver<Work>,
    lines: &SyncSender<writer::Line>,
    pending: &AtomicUsize,
    blocking: &Blocking,
) {
    while let Ok(work) = entries.recv() {
        let entry = match work {
            Work::Inspect(opener, _place) => {
                inspector.inspect(blocking, &opener);
                continue;
            }
            Work::Write(entry) => entry,
        };
        let text = inspector.line(blocking, &entry);
        let line = writer::Line { text, count: entry.count, _place: entry.place };
        if lines.try_send(line).is_err() {
            pending.fetch_sub(1, Ordering::Relaxed);
            inspector.metrics.dropped(Loss::Queue, entry.count);
        }
    }
}

fn on_thread(name: &str, work: impl FnOnce(&Blocking) + Send + 'static) -> io::Result<()> {
    let on_its_own = move || {
        work(&Blocking::here().expect("a thread of its own is no runtime's"));
    };
    thread::Builder::new().name(name.to_owned()).spawn(on_its_own).map(drop)
}

#[cfg(test)]
mod tests;
