//! Shows operators the requests that a pod made.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::account::time;
use kiam_core::telemetry::times;
use kiam_requests::imds::{RecordedRequest, RequestCounts};

/// Equal requests, for `/pods`.
pub(super) fn json(noted: &RecordedRequest) -> Value {
    let mut shown = json!({
        "method": noted.method, "path": noted.path, "userAgent": noted.user_agent,
        "count": noted.count, "last": time(noted.last),
    });
    if let Some(reason) = noted.reason {
        shown["reason"] = json!(format!("{reason:?}"));
    }
    shown
}

/// All requests, for `explain`.
pub(super) fn counted(counts: &RequestCounts, last: SystemTime) -> String {
    let RequestCounts { requests, credentials, without_token, .. } = counts;
    let last = time(last);
    format!(
        "{requests}, {credentials} answered with credentials, {without_token} without a token, last at {last}"
    )
}

/// Equal requests, for `explain`.
pub(super) fn text(noted: &RecordedRequest) -> String {
    let RecordedRequest { method, path, count, .. } = noted;
    let reason = noted.reason.map(|reason| format!(" ({reason:?})")).unwrap_or_default();
    let program = match noted.user_agent.as_str() {
        "" => "without a User-Agent".to_owned(),
        program => format!("by \"{program}\""),
    };
    format!("{method} {path}{reason}, {}, {program}, last at {}", times(*count), time(noted.last))
}
