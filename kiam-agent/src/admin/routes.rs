//! The paths for operators, and their answers.

use std::fmt::Write as _;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use prometheus_client::encoding::text::encode;
use serde::Serialize;

use super::{Operations, Surface};

/// The longest body of a request: the name of a log level is short.
const MAX_BODY: usize = 256;
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The query of a path that has a text and JSON, for JSON.
pub(super) const JSON: &str = "output=json";

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    Json,
}

/// Answers one request.
pub(super) async fn answer(
    operations: &Operations,
    surface: Surface,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let form = if request.uri().query() == Some(JSON) { Form::Json } else { Form::Text };
    let read = matches!(*request.method(), Method::GET | Method::HEAD);
    let status = surface != Surface::Metrics;
    let everything = surface == Surface::Everything;
    match path.as_str() {
        "/metrics" if read => metrics(operations),
        "/live" if read && status => text(StatusCode::OK, "live\n".to_owned()),
        "/ready" if read && status => ready(operations),
        "/status" if read && everything => json(StatusCode::OK, &(operations.status)()),
        "/pods" if read && everything => json(StatusCode::OK, &(operations.pods)()),
        "/log-level" if read && everything => text(StatusCode::OK, (operations.log_level)() + "\n"),
        "/log-level" if request.method() == Method::PUT && everything => {
            set_log_level(operations, request).await
        }
        path => match (pod(path, "/explain/"), pod(path, "/refresh/")) {
            (Some((namespace, name)), _) if read && everything => {
                explain(operations, namespace, name, form)
            }
            (_, Some((namespace, name))) if request.method() == Method::POST && everything => {
                refresh(operations, namespace, name).await
            }
            _ => text(StatusCode::NOT_FOUND, "not found\n".to_owned()),
        },
    }
}

/// The namespace and the name of the pod in `path` after `prefix`.
fn pod<'a>(path: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let pod = path.strip_prefix(prefix)?.split_once('/')?;
    (!pod.1.contains('/')).then_some(pod)
}

/// Explains a pod. 403 means that the pod gets no credentials, not that the operator may not ask.
fn explain(
    operations: &Operations,
    namespace: &str,
    name: &str,
    form: Form,
) -> Response<Full<Bytes>> {
    let explanation = (operations.explain)(namespace, name);
    let status = if explanation.served { StatusCode::OK } else { StatusCode::FORBIDDEN };
    match form {
        Form::Text => text(status, explanation.text),
        Form::Json => json(status, &explanation),
    }
}

/// Refreshes a pod's credentials. 502 means that AWS denied them or did not answer.
async fn refresh(operations: &Operations, namespace: &str, name: &str) -> Response<Full<Bytes>> {
    match (operations.refresh)(namespace, name).await {
        Ok(came) => text(StatusCode::OK, came),
        Err(why) => text(StatusCode::BAD_GATEWAY, why),
    }
}

fn ready(operations: &Operations) -> Response<Full<Bytes>> {
    let pending = operations.readiness.pending();
    let details = operations.readiness.details().into_iter();
    let details: String = details.map(|(name, text)| format!("{name}: {text}\n")).collect();
    if pending.is_empty() {
        return text(StatusCode::OK, format!("ready\n{details}"));
    }
    let lines: String = pending.iter().map(|name| format!("pending: {name}\n")).collect();
    text(StatusCode::SERVICE_UNAVAILABLE, lines + &details)
}

fn metrics(operations: &Operations) -> Response<Full<Bytes>> {
    let Some(registry) = operations.registry.get() else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "the agent is starting\n".to_owned());
    };
    let mut body = String::new();
    match encode(&mut body, registry) {
        Ok(()) => typed(StatusCode::OK, METRICS_TYPE, body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")),
    }
}

async fn set_log_level(
    operations: &Operations,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let Ok(body) = Limited::new(request.into_body(), MAX_BODY).collect().await else {
        return text(StatusCode::BAD_REQUEST, "the body must be a level's name\n".to_owned());
    };
    let level = String::from_utf8_lossy(&body.to_bytes()).trim().to_owned();
    match (operations.set_log_level)(&level) {
        Ok(()) => text(StatusCode::OK, (operations.log_level)() + "\n"),
        Err(reason) => text(StatusCode::BAD_REQUEST, reason + "\n"),
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(value) {
        Ok(body) => typed(status, "application/json", ascii(&(body + "\n"))),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("JSON: {error}\n")),
    }
}

/// `json` in printable ASCII: tenants write annotations, and operators read this in terminals. Other characters occur in
/// strings alone, where an escape means the same.
pub(crate) fn ascii(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for character in json.chars() {
        if matches!(character, '\n' | ' '..='~') {
            shown.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            // Writing to memory does not fail.
            let _ = write!(shown, "\\u{unit:04x}");
        }
    }
    shown
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body)
}

fn typed(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_no_character_that_a_terminal_obeys_and_means_the_same() {
        let text = "a\n\u{1b}[2J\u{7f}\u{9b}31m\u{202e}\u{2028}\"\\\u{1f980}\u{e9}";
        let value = serde_json::json!({ "annotation": text, text: [1, null] });
        let shown = ascii(&format!("{value:#}"));
        assert!(shown.chars().all(|it| it == '\n' || (' '..='~').contains(&it)), "{shown:?}");
        let read: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(read, value);
    }
}
