//! Answers as EC2's server gives them.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;

use super::{
    Error, Place,
    token::{TokenTtl, X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS},
};

/// What the real service calls itself; some clients look.
const SERVER: HeaderValue = HeaderValue::from_static("EC2ws");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain");
/// Tells a person why; programs judge by the status.
const REASON: &str = "x-kiam-reason";
/// Characters of a reason that are sent.
const MAX_REASON: usize = 256;

/// What a request is answered with.
pub(super) struct Answer {
    pub(super) body: Bytes,
    pub(super) ttl: Option<TokenTtl>,
}

/// An answer with `body`.
pub(super) fn text(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let length = HeaderValue::from(body.len());
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, TEXT);
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::SERVER, SERVER);
    response
}

/// The answer to what failed at `place`: no body, and the reason in a header.
pub(super) fn refusal(error: &Error, place: Place) -> Response<Full<Bytes>> {
    let mut response = text(error.status(place), Bytes::new());
    let headers = response.headers_mut();
    headers.insert(REASON, visible(&error.to_string()));
    match error {
        Error::Method { allow } => {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        // What follows on the connection could be the body.
        Error::Body => {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Error::NoCredentials { retry_after, .. } => {
            let seconds = retry_after.as_secs().clamp(1, 60);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        Error::Upstream(_) if response.status() == StatusCode::SERVICE_UNAVAILABLE => {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(1));
        }
        _ => {}
    }
    response
}

/// `text` as the value of a header: one line of visible ASCII.
fn visible(text: &str) -> HeaderValue {
    let shown: String = text
        .chars()
        .take(MAX_REASON)
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
        .collect();
    HeaderValue::from_str(&shown).expect("visible ASCII is a header value")
}

// === impl Answer ===

impl Answer {
    pub(super) fn response(&self) -> Response<Full<Bytes>> {
        let mut response = text(StatusCode::OK, self.body.clone());
        if let Some(ttl) = self.ttl {
            // Rust's SDK takes no token without it.
            let value = HeaderValue::from(ttl.as_secs());
            response.headers_mut().insert(X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS, value);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_one_short_line_of_visible_ascii() {
        let shown = visible(&format!("a\r\nSet-Cookie: x\0\u{1b}[31mé{}", "b".repeat(10_000)));
        let shown = shown.to_str().unwrap();
        assert!(shown.starts_with("a??Set-Cookie: x??[31m?bbb"), "{shown}");
        assert_eq!(shown.len(), MAX_REASON);
    }
}
