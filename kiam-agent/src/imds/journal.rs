//! The journal of each pod's rejected requests, and of its requests without a session token (IMDSv1). It shows operators
//! which paths to open and which programs to update.
//!
//! Pods, requests of a pod, and bytes of a request are bounded. A pod's requests displace only its own.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
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
    pages: Arc<Mutex<Pages>>,
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
struct Pages {
    /// A counter of requests, as a logical clock.
    turn: u64,
    pods: RequestMap<PodUid, DatedPage>,
}

#[derive(Debug, Default)]
struct DatedPage {
    turn: u64,
    page: Page,
}

// === impl Journal ===

impl Journal {
    /// Records a rejected request of the pod `uid`.
    pub(crate) fn refused(
        &self,
        uid: &PodUid,
        head: &request::Parts,
        reason: ErrorKind,
        now: SystemTime,
    ) {
        let request = ShownRequest::new(head);
        request.count(&mut self.pages().of(uid).refused, Some(reason), now);
    }

    /// Records an accepted request of the pod `uid` without a session token.
    pub(crate) fn imdsv1(&self, uid: &PodUid, head: &request::Parts, now: SystemTime) {
        let request = ShownRequest::new(head);
        request.count(&mut self.pages().of(uid).imdsv1, None, now);
    }

    /// Counts an answered request of the pod `uid`.
    pub(super) fn answered(&self, uid: &PodUid, answered: Answered, now: SystemTime) {
        self.activity.count(uid, answered, now);
    }

    /// The requests of the pod `uid`.
    #[must_use]
    pub fn of(&self, uid: &PodUid) -> Page {
        let page = self.pages().pods.get(uid).map(|dated| dated.page.clone());
        Page { counts: self.activity.of(uid), ..page.unwrap_or_default() }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Pages ===

impl Pages {
    /// The pod's page. Makes room for a new one.
    fn of(&mut self, uid: &PodUid) -> &mut Page {
        if self.pods.len() >= JOURNAL_PODS && !self.pods.contains_key(uid) {
            let oldest = self.pods.iter().min_by_key(|(_, dated)| dated.turn);
            if let Some(oldest) = oldest.map(|(uid, _)| uid.clone()) {
                self.pods.remove(&oldest);
            }
        }
        self.turn += 1;
        let dated = self.pods.entry(uid.clone()).or_default();
        dated.turn = self.turn;
        &mut dated.page
    }
}

// === impl RecordedRequest ===

impl RecordedRequest {
    fn is_like(&self, shown: &ShownRequest<'_>, reason: Option<ErrorKind>) -> bool {
        (&*self.method, &*self.path, &*self.user_agent, self.reason)
            == (&*shown.method, &*shown.path, &*shown.user_agent, reason)
    }
}

// === impl ShownRequest ===

impl<'a> ShownRequest<'a> {
    fn new(head: &'a request::Parts) -> Self {
        let program = head.headers.get(header::USER_AGENT).map_or(&b""[..], |it| it.as_bytes());
        let program = &program[..program.len().min(MAX_USER_AGENT)];
        Self {
            method: shown(head.method.as_str().as_bytes(), MAX_METHOD),
            path: shown(head.uri.path().as_bytes(), MAX_PATH),
            user_agent: shown(program, MAX_USER_AGENT),
        }
    }

    /// Counts it in `list`, the latest first: with its equals, or in place of the least recent one.
    fn count(self, list: &mut Vec<RecordedRequest>, reason: Option<ErrorKind>, now: SystemTime) {
        if let Some(at) = list.iter().position(|known| known.is_like(&self, reason)) {
            list[at].count += 1;
            list[at].last = now;
            list[..=at].rotate_right(1);
            return;
        }
        let Self { method, path, user_agent } = self;
        list.truncate(REQUESTS - 1);
        let request = RecordedRequest {
            method: method.into_owned(),
            path: path.into_owned(),
            user_agent: user_agent.into_owned(),
            reason,
            count: 1,
            last: now,
        };
        list.insert(0, request);
    }
}

/// `text` in printable ASCII, with at most `most` bytes.
fn shown(text: &[u8], most: usize) -> Cow<'_, str> {
    match QuotedText::of_bytes(text) {
        Cow::Borrowed(text) => Cow::Borrowed(&text[..text.len().min(most)]),
        Cow::Owned(mut text) => {
            text.truncate(most);
            Cow::Owned(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
            journal.refused(&uid(n), &head("/x", b""), ErrorKind::Path, at(0));
            journal.refused(&uid(0), &head("/x", b""), ErrorKind::Path, at(0));
        }
        assert_eq!(journal.pages().pods.len(), JOURNAL_PODS);
        assert_eq!(journal.of(&uid(0)).refused[0].count, 10_001);
        assert_eq!(journal.of(&uid(9_999)).refused.len(), 1);
        assert_eq!(journal.of(&uid(1)), Page::default());
    }
}
