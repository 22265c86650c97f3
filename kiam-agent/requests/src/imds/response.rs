//! HTTP answers like those of EC2's server.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;

use super::{
    Error, PathKind,
    token::{TokenTtl, X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS},
};
use kiam_core::telemetry::plain_char;

/// The real service's name, which some clients check.
const SERVER: HeaderValue = HeaderValue::from_static("EC2ws");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain");
/// The header with the reason, for people. Programs use the status.
const REASON: &str = "x-kiam-reason";
/// The longest `Retry-After`. SDK for Go v1, SDK for JavaScript v2 and urllib3 obey it before each attempt, so that one
/// minute would hang a program for several.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The most characters of a reason that are sent.
const MAX_REASON: usize = 256;

/// The answer to an accepted request.
pub(super) struct Answer {
    pub(super) body: Bytes,
    pub(super) ttl: Option<TokenTtl>,
}

// === impl Answer ===

impl Answer {
    pub(super) fn response(&self) -> Response<Full<Bytes>> {
        let mut response = text(StatusCode::OK, self.body.clone());
        if let Some(ttl) = self.ttl {
            // Rust's SDK accepts no token without this header.
            let value = HeaderValue::from(ttl.as_secs());
            response.headers_mut().insert(X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS, value);
        }
        response
    }
}

/// A response with `body`.
pub(super) fn text(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    // hyper adds the length of any other body, without a value on the heap.
    let length = body.is_empty().then_some(HeaderValue::from_static("0"));
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, TEXT);
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length);
    }
    headers.insert(header::SERVER, SERVER);
    response
}

/// The response for an error at a path of this `kind`: without a body, and with the reason in a header.
pub(super) fn refusal(error: &Error, kind: PathKind) -> Response<Full<Bytes>> {
    let status = error.status(kind);
    let mut response = text(status, Bytes::new());
    let headers = response.headers_mut();
    headers.insert(REASON, visible(&error.to_string()));
    match error {
        Error::Method { allow } => {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        // The next bytes on the connection may be the body.
        Error::Body => {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        // If the wait is too long, clients get no hint and follow their own schedule.
        Error::NoCredentials { retry_after, .. } if *retry_after > RETRY_AFTER => {}
        Error::NoCredentials { .. } | Error::Upstream(_)
            if status == StatusCode::SERVICE_UNAVAILABLE =>
        {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER.as_secs()));
        }
        _ => {}
    }
    response
}

/// `text` as a header's value: one line of visible ASCII.
fn visible(text: &str) -> HeaderValue {
    let shown: String = text.chars().take(MAX_REASON).map(plain_char).collect();
    HeaderValue::from_str(&shown).expect("visible ASCII is a header value")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imds::UpstreamError;

    #[test]
    fn no_client_is_told_to_wait_for_longer_than_a_second() {
        let lack = |millis| Error::NoCredentials {
            reason: String::new(),
            retry_after: Duration::from_millis(millis),
        };
        let cases = [
            (lack(0), Some("1")),
            (lack(1000), Some("1")),
            (lack(1001), None),
            (lack(60_000), None),
            (lack(600_000), None),
            (Error::Upstream(UpstreamError::Deadline), Some("1")),
            (Error::Upstream(UpstreamError::NotFound), None),
            (Error::Path, None),
        ];
        for (error, expected) in cases {
            for kind in [PathKind::Credentials, PathKind::Elsewhere] {
                let response = refusal(&error, kind);
                let sent = response.headers().get(header::RETRY_AFTER);
                assert_eq!(sent.map(|value| value.to_str().unwrap()), expected, "{error:?}");
            }
        }
    }

    #[test]
    fn reasons_are_one_short_line_of_visible_ascii() {
        let shown = visible(&format!("a\r\nSet-Cookie: x\0\u{1b}[31mé{}", "b".repeat(10_000)));
        let shown = shown.to_str().unwrap();
        assert!(shown.starts_with("a??Set-Cookie: x??[31m?bbb"), "{shown}");
        assert_eq!(shown.len(), MAX_REASON);
    }
}
