//! The log of requests without a session token (IMDSv1), which shows operators when they can require tokens.

use std::{
    collections::HashSet,
    sync::{PoisonError, RwLock},
    time::Duration,
};

use http::{HeaderMap, header};
use tokio::time::Instant;
use tracing::info;

use kiam_core::{
    maps::RequestMap,
    pods::{Pod, PodUid},
    role::QuotedText,
};

/// The shortest time between two log lines about one program of a pod.
pub(super) const PERIOD: Duration = Duration::from_secs(3600);
/// The most programs of one pod that are logged in a period: a pod can send any number of names.
const PROGRAMS: usize = 8;

/// The log of IMDSv1 requests: one line for each pod and `User-Agent` in an hour.
#[derive(Debug, Default)]
pub(super) struct Version1(RwLock<LoggedPrograms>);

#[derive(Debug, Default)]
struct LoggedPrograms {
    /// The start of the period. At its end all entries are forgotten, also those of ended pods.
    since: Option<Instant>,
    programs: RequestMap<PodUid, HashSet<String>>,
}

// === impl Version1 ===

impl Version1 {
    /// Logs a request of `pod`, unless an equal one was logged in this period.
    pub(super) fn log(&self, pod: &Pod, headers: &HeaderMap) {
        let program = headers.get(header::USER_AGENT).map_or(&b""[..], |value| value.as_bytes());
        let program = QuotedText::of_bytes(program);
        if self.is_news(&pod.uid, &program) {
            info!(
                pod.name = pod.name,
                pod.namespace = pod.namespace,
                user_agent = &*program,
                "IMDSv1 request"
            );
        }
    }

    fn is_news(&self, pod: &PodUid, program: &str) -> bool {
        let is_old = |logged: &LoggedPrograms| {
            logged.since.is_some_and(|since| since.elapsed() < PERIOD) && logged.has(pod, program)
        };
        if is_old(&self.0.read().unwrap_or_else(PoisonError::into_inner)) {
            return false;
        }
        let mut logged = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if logged.since.is_none_or(|since| since.elapsed() >= PERIOD) {
            *logged =
                LoggedPrograms { since: Some(Instant::now()), programs: RequestMap::default() };
        }
        if logged.has(pod, program) {
            return false;
        }
        logged.programs.entry(pod.clone()).or_default().insert(program.to_owned())
    }
}

// === impl LoggedPrograms ===

impl LoggedPrograms {
    /// Whether the program was logged for the pod, or enough others were.
    fn has(&self, pod: &PodUid, program: &str) -> bool {
        let own = self.programs.get(pod);
        own.is_some_and(|own| own.len() >= PROGRAMS || own.contains(program))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use kiam_core::telemetry::captured::CapturedLogs;

    #[tokio::test(start_paused = true)]
    async fn each_program_of_a_pod_is_logged_once_an_hour() {
        let captured = CapturedLogs::start(tracing::Level::INFO);
        let log = Version1::default();
        let request = |n, program: &str| {
            let mut headers = HeaderMap::new();
            headers
                .insert(header::USER_AGENT, HeaderValue::from_bytes(program.as_bytes()).unwrap());
            log.log(&Pod::test(n), &headers);
        };
        let lines = || captured.lines_with("IMDSv1 request").len();
        for _ in 0..3 {
            request(1, "Boto/2.49");
            request(1, "s3fs");
            request(2, "s3fs");
            log.log(&Pod::test(2), &HeaderMap::new());
        }
        assert_eq!(lines(), 4);
        let line = captured.lines_with("Boto").concat();
        for field in ["pod.name=\"pod-1\"", "pod.namespace=\"default\"", "user_agent=\"Boto/2.49\""]
        {
            assert!(line.contains(field), "{line}");
        }
        tokio::time::advance(PERIOD).await;
        request(1, "s3fs");
        assert_eq!(lines(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_can_neither_flood_the_log_nor_write_what_it_likes_there() {
        let captured = CapturedLogs::start(tracing::Level::INFO);
        let log = Version1::default();
        for n in 0..10_000 {
            let name = format!("\u{e9}\t{n} {}", "x".repeat(5000));
            let mut headers = HeaderMap::new();
            headers.insert(header::USER_AGENT, HeaderValue::from_bytes(name.as_bytes()).unwrap());
            log.log(&Pod::test(1), &headers);
        }
        let lines = captured.lines_with("IMDSv1 request");
        assert_eq!(lines.len(), PROGRAMS);
        for line in lines {
            assert!(line.len() < 500 && line.is_ascii() && !line.contains('\t'), "{line}");
        }
        log.log(&Pod::test(2), &HeaderMap::new());
        assert_eq!(captured.lines_with("IMDSv1 request").len(), PROGRAMS + 1);
    }
}
