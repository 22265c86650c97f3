//! The journal of each pod's rejected requests, and of its requests without a session token (IMDSv1). It shows operators
//! which paths to open and which programs to update.
//!
//! Pods, requests of a pod, and bytes of a request are bounded. A pod's requests displace only its own.

use std::{
    borrow::Cow,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use http::{header, request};

use super::{
    ErrorKind,
    activity::{Activity, Answered, RequestCounts},
};
use kiam_core::{maps::RequestMap, pods::PodUid, role::QuotedText};

/// The most pods in the journal: more than a node runs. Beyond that the least recent is forgotten.
const JOURNAL_PODS: usize = 512;
/// The most different requests of one pod, in each list.
const REQUESTS: usize = 16;
/// The most bytes that are kept of a client's texts.
const MAX_METHOD: usize = 16;
const MAX_PATH: usize = 160;
const MAX_USER_AGENT: usize = 96;

/// The journal of requests by pod. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    pages: Arc<RwLock<Pages>>,
    activity: Activity,
}

/// The requests of one pod, the latest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Rejected requests.
    pub refused: Vec<RecordedRequest>,
    /// Accepted requests without a session token.
    pub imdsv1: Vec<RecordedRequest>,
    /// How many requests there were.
    pub counts: RequestCounts,
}

/// Equal requests, counted. The texts are the client's, in printable ASCII and short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedRequest {
    /// The method, such as `GET`.
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The `User-Agent`, empty if none was sent.
    pub user_agent: String,
    /// Why the requests were rejected, if they were.
    pub reason: Option<ErrorKind>,
    /// The number of requests.
    pub count: u64,
    /// The time of the last request.
    pub last: SystemTime,
}

/// A request's texts as they are shown.
struct ShownRequest<'a> {
    method: Cow<'a, str>,
    path: Cow<'a, str>,
    user_agent: Cow<'a, str>,
}

#[derive(Debug, Default)]
struct Pages(RequestMap<PodUid, Tallies>);

/// The requests of one pod. A request that is like an earlier one only adds to it.
#[derive(Debug, Default)]
struct Tallies([Vec<Tally>; 2]);

/// One of a pod's lists.
#[derive(Clone, Copy, Debug)]
enum List {
    Refused,
    WithoutToken,
}

/// Equal requests.
#[derive(Debug)]
struct Tally {
    method: String,
    path: String,
    user_agent: String,
    reason: Option<ErrorKind>,
    /// Apart from the texts: threads that write here do not keep others from reading those.
    marks: Box<Marks>,
}

#[derive(Debug)]
struct Marks {
    count: AtomicU64,
    /// The time of the last one, in nanoseconds since the epoch.
    last: AtomicU64,
}

// === impl Journal ===

impl Journal {
    /// Records a rejected request of the pod `uid`.
    pub fn refused(&self, uid: &PodUid, head: &request::Parts, reason: ErrorKind, now: SystemTime) {
        self.record(List::Refused, uid, (&ShownRequest::new(head), Some(reason)), now);
    }

    /// Records an accepted request of the pod `uid` without a session token.
    pub fn imdsv1(&self, uid: &PodUid, head: &request::Parts, now: SystemTime) {
        self.record(List::WithoutToken, uid, (&ShownRequest::new(head), None), now);
    }

    /// Counts an answered request of the pod `uid`.
    pub(super) fn answered(&self, uid: &PodUid, answered: Answered, now: SystemTime) {
        self.activity.count(uid, answered, now);
    }

    /// The requests of the pod `uid`.
    #[must_use]
    pub fn of(&self, uid: &PodUid) -> Page {
        let counts = self.activity.of(uid);
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        let Some(tallies) = pages.0.get(uid) else { return Page { counts, ..Page::default() } };
        Page {
            refused: tallies.show(List::Refused),
            imdsv1: tallies.show(List::WithoutToken),
            counts,
        }
    }

    fn record(
        &self,
        list: List,
        uid: &PodUid,
        asked: (&ShownRequest<'_>, Option<ErrorKind>),
        now: SystemTime,
    ) {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        if pages.add(list, uid, asked, now) {
            return;
        }
        drop(pages);
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        if !pages.add(list, uid, asked, now) {
            pages.insert(list, uid, asked, now);
        }
    }
}

// === impl Pages ===

impl Pages {
    /// Counts a request with its equals; `false` if there are none.
    fn add(
        &self,
        list: List,
        uid: &PodUid,
        (shown, reason): (&ShownRequest<'_>, Option<ErrorKind>),
        now: u64,
    ) -> bool {
        let Some(tallies) = self.0.get(uid) else { return false };
        let known = tallies.0[list as usize].iter().find(|known| known.is_like(shown, reason));
        let Some(known) = known else { return false };
        known.marks.count.fetch_add(1, Relaxed);
        known.marks.last.fetch_max(now, Relaxed);
        true
    }

    /// Adds a request that has no equals, in place of the least recent one. Makes room for a new pod.
    fn insert(
        &mut self,
        list: List,
        uid: &PodUid,
        (shown, reason): (&ShownRequest<'_>, Option<ErrorKind>),
        now: u64,
    ) {
        if self.0.len() >= JOURNAL_PODS && !self.0.contains_key(uid) {
            let oldest = self.0.iter().min_by_key(|(_, tallies)| tallies.last());
            if let Some(oldest) = oldest.map(|(uid, _)| uid.clone()) {
                self.0.remove(&oldest);
            }
        }
        let list = &mut self.0.entry(uid.clone()).or_default().0[list as usize];
        if list.len() >= REQUESTS {
            let oldest = (0..list.len()).min_by_key(|at| list[*at].last());
            oldest.map(|at| list.swap_remove(at));
        }
        list.push(Tally {
            method: shown.method.clone().into_owned(),
            path: shown.path.clone().into_owned(),
            user_agent: shown.user_agent.clone().into_owned(),
            reason,
            marks: Box::new(Marks { count: AtomicU64::new(1), last: AtomicU64::new(now) }),
        });
    }
}

// === impl Tallies ===

impl Tallies {
    /// The time of the pod's last request.
    fn last(&self) -> u64 {
        self.0.iter().flatten().map(Tally::last).max().unwrap_or_default()
    }

    /// The requests of a list, the latest first.
    fn show(&self, list: List) -> Vec<RecordedRequest> {
        let mut all: Vec<&Tally> = self.0[list as usize].iter().collect();
        all.sort_by_key(|tally| std::cmp::Reverse(tally.last()));
        all.into_iter().map(Tally::show).collect()
    }
}

// === impl Tally ===

impl Tally {
    fn last(&self) -> u64 {
        self.marks.last.load(Relaxed)
    }

    fn is_like(&self, shown: &ShownRequest<'_>, reason: Option<ErrorKind>) -> bool {
        (&*self.method, &*self.path, &*self.user_agent, self.reason)
            == (&*shown.method, &*shown.path, &*shown.user_agent, reason)
    }

    fn show(&self) -> RecordedRequest {
        RecordedRequest {
            method: self.method.clone(),
            path: self.path.clone(),
            user_agent: self.user_agent.clone(),
            reason: self.reason,
            count: self.marks.count.load(Relaxed),
            last: SystemTime::UNIX_EPOCH + Duration::from_nanos(self.last()),
        }
    }
}

// === impl ShownRequest ===

impl<'a> ShownRequest<'a> {
    fn new(head: &'a request::Parts) -> Self {
        let program = head.headers.get(header::USER_AGENT).map_or(&b""[..], |it| it.as_bytes());
        let program = &program[..program.len().min(MAX_USER_AGENT)];
        Self {
            method: shortened(QuotedText::of_text(head.method.as_str()), MAX_METHOD),
            path: shortened(QuotedText::of_text(head.uri.path()), MAX_PATH),
            user_agent: shortened(QuotedText::of_bytes(program), MAX_USER_AGENT),
        }
    }
}

/// `text`, which is ASCII, with at most `most` bytes.
fn shortened(text: Cow<'_, str>, most: usize) -> Cow<'_, str> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(&text[..text.len().min(most)]),
        Cow::Owned(mut text) => {
            text.truncate(most);
            Cow::Owned(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request};

    use super::*;
    use kiam_core::pods::fixtures::uid;

    fn head(path: &str, program: &[u8]) -> request::Parts {
        let request = Request::builder()
            .uri(path)
            .header(header::USER_AGENT, HeaderValue::from_bytes(program).unwrap());
        request.body(()).unwrap().into_parts().0
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn requests_that_are_alike_are_counted_and_the_latest_come_first() {
        let journal = Journal::default();
        let (user_data, mac) = (head("/latest/user-data?x", b"curl"), head("/latest/mac", b"curl"));
        journal.refused(&uid(1), &user_data, ErrorKind::Path, at(1));
        journal.refused(&uid(1), &mac, ErrorKind::Path, at(2));
        journal.refused(&uid(1), &user_data, ErrorKind::TokenMissing, at(3));
        journal.refused(&uid(1), &user_data, ErrorKind::Path, at(4));
        journal.imdsv1(&uid(1), &mac, at(5));
        let page = journal.of(&uid(1));
        let refused: Vec<_> = page
            .refused
            .iter()
            .map(|it| (it.path.as_str(), it.reason, it.count, it.last))
            .collect();
        assert_eq!(
            refused,
            [
                ("/latest/user-data", Some(ErrorKind::Path), 2, at(4)),
                ("/latest/user-data", Some(ErrorKind::TokenMissing), 1, at(3)),
                ("/latest/mac", Some(ErrorKind::Path), 1, at(2)),
            ]
        );
        assert_eq!(page.imdsv1.len(), 1);
        assert_eq!(journal.of(&uid(2)), Page::default());
    }

    #[test]
    fn a_flood_of_one_pod_pushes_out_only_its_own() {
        let journal = Journal::default();
        journal.refused(&uid(1), &head("/mine", b"mine"), ErrorKind::Path, at(0));
        for n in 0..20_000 {
            let path = format!("/{n}/{}", "%c3%a9".repeat(1000));
            let program =
                ["\u{e9}\u{202e}".repeat(1000).as_bytes(), n.to_string().as_bytes()].concat();
            journal.refused(&uid(2), &head(&path, &program), ErrorKind::Path, at(n));
            journal.imdsv1(&uid(2), &head(&path, &program), at(n));
        }
        assert_eq!(journal.of(&uid(1)).refused[0].path, "/mine");
        let flood = journal.of(&uid(2));
        assert_eq!((flood.refused.len(), flood.imdsv1.len()), (REQUESTS, REQUESTS));
        assert!(flood.refused[0].path.starts_with("/19999/"));
        for request in flood.refused.iter().chain(&flood.imdsv1) {
            assert!(request.path.len() <= MAX_PATH && request.user_agent.len() <= MAX_USER_AGENT);
            assert!(
                request.path.is_ascii()
                    && request.user_agent.bytes().all(|it| it.is_ascii_graphic())
            );
        }
    }

    #[test]
    fn the_pods_are_bounded_and_those_that_ask_stay() {
        let journal = Journal::default();
        for n in 0..10_000 {
            journal.refused(&uid(n), &head("/x", b""), ErrorKind::Path, at(n.into()));
            journal.refused(&uid(0), &head("/x", b""), ErrorKind::Path, at(n.into()));
        }
        assert_eq!(journal.pages.read().unwrap().0.len(), JOURNAL_PODS);
        assert_eq!(journal.of(&uid(0)).refused[0].count, 10_001);
        assert_eq!(journal.of(&uid(9_999)).refused.len(), 1);
        assert_eq!(journal.of(&uid(1)), Page::default());
    }
}
