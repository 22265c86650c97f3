//! What is remembered of one connection, so that its next request need not find it out again.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, header};
use tokio::time::Instant;

use super::token::VerifiedToken;
use kiam_core::{
    pods::{Pod, PodUid},
    policy::Standing,
};

/// How long a standing is good for, if no record changes. Some of what it was looked up by changes without a record: the
/// node's own addresses, and the age of the watch, by which the pod of an address is known.
const LOOKED_UP: Duration = Duration::from_secs(1);
/// The longest `User-Agent` that is remembered: more than those of SDKs have.
const MAX_USER_AGENT: usize = 256;

/// The memory of one connection, which is one client's alone, with one request at a time.
#[derive(Default)]
pub struct Session {
    /// The token that was verified last.
    pub(super) token: VerifiedToken,
    standing: Mutex<Option<Known>>,
    program: Mutex<Option<Program>>,
    has_asked: AtomicBool,
}

/// The standing of the client, as of a revision of the records.
struct Known {
    pod: Arc<Pod>,
    standing: Arc<Standing>,
    revision: u64,
    at: Instant,
}

/// The program that was logged last, by its `User-Agent`: a copy, as the value of a header keeps the whole head.
struct Program {
    pod: PodUid,
    user_agent: Box<[u8]>,
    at: Instant,
}

// === impl Session ===

impl Session {
    /// The client's pod and its standing, if no record has changed since `revision` and it was looked up lately.
    pub(super) fn standing(
        &self,
        revision: u64,
        now: Instant,
    ) -> Option<(Arc<Pod>, Arc<Standing>)> {
        let known = lock(&self.standing);
        let known = known.as_ref().filter(|known| {
            known.revision == revision && now.saturating_duration_since(known.at) < LOOKED_UP
        })?;
        Some((known.pod.clone(), known.standing.clone()))
    }

    /// Remembers a standing that was looked up, at `at`, after `revision` was read.
    pub(super) fn remember(
        &self,
        (pod, standing): (&Arc<Pod>, &Arc<Standing>),
        revision: u64,
        at: Instant,
    ) {
        let (pod, standing) = (pod.clone(), standing.clone());
        *lock(&self.standing) = Some(Known { pod, standing, revision, at });
    }

    /// Whether the program of `headers` is another one than that of the last request of `pod`, or that was `period` ago.
    pub(super) fn is_news(
        &self,
        pod: &PodUid,
        headers: &HeaderMap,
        period: Duration,
        now: Instant,
    ) -> bool {
        let user_agent = headers.get(header::USER_AGENT).map_or(&b""[..], |it| it.as_bytes());
        let mut last = lock(&self.program);
        let is_known = |known: &Program| {
            known.pod == *pod
                && *known.user_agent == *user_agent
                && now.saturating_duration_since(known.at) < period
        };
        if last.as_ref().is_some_and(is_known) {
            return false;
        }
        *last = (user_agent.len() <= MAX_USER_AGENT).then(|| Program {
            pod: pod.clone(),
            user_agent: user_agent.into(),
            at: now,
        });
        true
    }

    /// Whether this is the connection's first request for credentials.
    pub(super) fn asks_first(&self) -> bool {
        !self.has_asked.swap(true, Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
