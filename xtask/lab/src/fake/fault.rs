//! Faults in single answers, in one shape for every fake: which requests, how often, how late, and what comes instead.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use tokio::{sync::watch, time};

use super::http::{Body, chunks, full};

/// A request that has come.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    /// As it was sent.
    pub(super) query: String,
    /// Of the query, and of a body that is a form.
    pub(super) fields: BTreeMap<String, String>,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// A fault to be; see [`Faults::inject`]. As made it meets every request, at once and for ever.
#[derive(Clone, Debug)]
pub struct Injected {
    method: Option<Method>,
    path: Option<String>,
    fields: Vec<(String, String)>,
    times: u64,
    latency: Duration,
    outcome: Outcome,
}

#[derive(Clone, Debug)]
enum Outcome {
    Usual,
    Refuse { status: u16, code: String },
    Hang,
    Cut,
    Body { status: u16, text: String },
    Edit(Edit),
    Header { name: &'static str, value: String },
}

#[derive(Clone)]
struct Edit(Arc<dyn Fn(&str) -> String + Send + Sync>);

/// The faults of one fake; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Vec<Fault>>>);

/// One that was injected; clones are the same, and Drop leaves it there.
#[derive(Clone, Debug)]
pub struct Fault(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    injected: Injected,
    met: AtomicU64,
    lifted: watch::Sender<bool>,
}

// === impl Call ===

impl Call {
    pub(super) fn new(request: Request<Bytes>) -> Self {
        let (head, body) = request.into_parts();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let mut fields = form_fields(query.as_bytes());
        let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        // A form is what curl and the AWS SDKs send unless they say something else.
        if kind.is_none_or(|kind| kind.starts_with("application/x-www-form-urlencoded")) {
            fields.extend(form_fields(&body));
        }
        let path = head.uri.path().to_owned();
        Self { method: head.method, path, query, fields, headers: head.headers, body }
    }

    pub(super) fn header(&self, name: impl header::AsHeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

// === impl Injected ===

impl Injected {
    /// The fake's own error answer of this status and code, such as `(403, "AccessDenied")`.
    #[must_use]
    pub fn refuse(status: u16, code: &str) -> Self {
        Self::new(Outcome::Refuse { status, code: code.to_owned() })
    }

    /// No answer until the fault is lifted; then the usual one, if the client still waits.
    #[must_use]
    pub fn hang() -> Self {
        Self::new(Outcome::Hang)
    }

    /// The usual answer, `latency` later.
    #[must_use]
    pub fn slow(latency: Duration) -> Self {
        Self::new(Outcome::Usual).after(latency)
    }

    /// The head and the first half of the usual answer, then the end of the connection. Of an answer without a
    /// length, as a watch is, half of the first line.
    #[must_use]
    pub fn cut() -> Self {
        Self::new(Outcome::Cut)
    }

    /// This body instead.
    #[must_use]
    pub fn body(status: u16, text: &str) -> Self {
        Self::new(Outcome::Body { status, text: text.to_owned() })
    }

    /// The usual answer with its text changed; of a watch, each line.
    #[must_use]
    pub fn edit(change: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        Self::new(Outcome::Edit(Edit(Arc::new(change))))
    }

    /// The usual answer with this header, such as `("date", "Tue, 15 Nov 1994 08:12:31 GMT")`.
    #[must_use]
    pub fn header(name: &'static str, value: &str) -> Self {
        Self::new(Outcome::Header { name, value: value.to_owned() })
    }

    /// Only requests of this method.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        self.method = Some(method);
        self
    }

    /// Only requests for this path.
    #[must_use]
    pub fn path(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Only requests with this field in their query or form.
    #[must_use]
    pub fn field(mut self, name: &str, value: &str) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Only the first so many requests that it meets.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// Waits this long first.
    #[must_use]
    pub fn after(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    fn new(outcome: Outcome) -> Self {
        let latency = Duration::ZERO;
        Self { method: None, path: None, fields: Vec::new(), times: u64::MAX, latency, outcome }
    }

    fn matches(&self, call: &Call) -> bool {
        self.method.as_ref().is_none_or(|method| *method == call.method)
            && self.path.as_ref().is_none_or(|path| *path == call.path)
            && self.fields.iter().all(|(name, value)| call.fields.get(name) == Some(value))
    }
}

// === impl Edit ===

impl fmt::Debug for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Edit")
    }
}

// === impl Faults ===

impl Faults {
    /// Adds a fault behind those that are there: the oldest that matches a request is the one that meets it, so
    /// several with [`Injected::times`] come one after the other.
    pub fn inject(&self, injected: Injected) -> Fault {
        let lifted = watch::Sender::new(false);
        let fault = Fault(Arc::new(Shared { injected, met: AtomicU64::new(0), lifted }));
        self.all().push(fault.clone());
        fault
    }

    /// Lifts them all.
    pub fn lift(&self) {
        let all = std::mem::take(&mut *self.all());
        all.iter().for_each(Fault::lift);
    }

    /// What `call` is answered: `usual`, but for the fault that meets it. `refusal` makes the fake's own error.
    pub(super) async fn answer(
        &self,
        call: &Call,
        refusal: impl FnOnce(StatusCode, &str) -> Response<Body>,
        usual: impl FnOnce() -> Response<Body>,
    ) -> Response<Body> {
        let met = self.all().iter().find(|fault| fault.meets(call)).cloned();
        let Some(fault) = met else { return usual() };
        let Injected { latency, outcome, .. } = &fault.0.injected;
        time::sleep(*latency).await;
        match outcome {
            Outcome::Usual => usual(),
            Outcome::Refuse { status, code } => refusal(status_of(*status), code),
            Outcome::Hang => {
                fault.until_lifted().await;
                usual()
            }
            Outcome::Cut => cut(usual()).await,
            Outcome::Body { status, text } => full(status_of(*status), "text/plain", text.clone()),
            Outcome::Edit(edit) => edited(usual(), edit.clone()),
            Outcome::Header { name, value } => {
                let mut answer = usual();
                if let Ok(value) = value.parse() {
                    answer.headers_mut().insert(*name, value);
                }
                answer
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Fault ===

impl Fault {
    /// Ends it: later requests are answered as usual, and so are those that hang.
    pub fn lift(&self) {
        self.0.lifted.send_replace(true);
    }

    /// How many requests it has met.
    #[must_use]
    pub fn met(&self) -> u64 {
        self.0.met.load(Ordering::SeqCst)
    }

    /// Whether it meets `call`; if so, that counts. Callers hold the list's lock, so nothing counts meanwhile.
    fn meets(&self, call: &Call) -> bool {
        let Shared { injected, met, lifted } = &*self.0;
        let meets = injected.matches(call)
            && !*lifted.borrow()
            && met.load(Ordering::SeqCst) < injected.times;
        if meets {
            met.fetch_add(1, Ordering::SeqCst);
        }
        meets
    }

    async fn until_lifted(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.lifted.subscribe().wait_for(|lifted| *lifted).await;
    }
}

/// The fields of a query or a form; of a repeated one the last.
pub(super) fn form_fields(text: &[u8]) -> BTreeMap<String, String> {
    form_urlencoded::parse(text).into_owned().collect()
}

fn status_of(code: u16) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// Half of the first bytes of `answer` under its whole length, so that the client knows that it broke off.
async fn cut(answer: Response<Body>) -> Response<Body> {
    use hyper::body::Body as _;
    let (mut head, mut body) = answer.into_parts();
    let whole = body.size_hint().exact();
    let first = body.frame().await.and_then(|Ok(frame)| frame.into_data().ok()).unwrap_or_default();
    let (tx, cut) = chunks("");
    tokio::spawn(async move {
        // Fails only when the client has gone.
        let _ = tx.send(first.slice(..first.len() / 2)).await;
        // All places free: what was sent is taken, and on its way before the end of the body is seen.
        let _ = tx.reserve_many(tx.max_capacity()).await;
    });
    if let Some(length) = whole {
        head.headers.insert(header::CONTENT_LENGTH, length.into());
    }
    Response::from_parts(head, cut.into_body())
}

fn edited(answer: Response<Body>, edit: Edit) -> Response<Body> {
    let change = move |data: Bytes| Bytes::from(edit.0(&String::from_utf8_lossy(&data)));
    answer.map(|body| body.map_frame(move |frame| frame.map_data(&change)).boxed())
}
