//! What the fakes share: an HTTP/1.1 server on its own thread that can be stopped and started on the same ports.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{self, Poll},
    thread::JoinHandle,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use rustix::net::{Shutdown, shutdown};
use tokio::sync::{mpsc, oneshot};

use super::fault::{Call, Faults};
use crate::Netns;

pub(super) type Body = BoxBody<Bytes, Infallible>;

/// Where a fake listens.
#[derive(Clone, Debug)]
pub struct Place {
    netns: Option<Netns>,
    address: SocketAddr,
}

/// Answers requests whose body has been read.
pub(super) trait Answer: Send + Sync + 'static {
    /// A request has come; whatever fault it meets, it counts.
    fn note(&self, peer: SocketAddr, call: &Call);

    /// The answer.
    fn answer(&self, call: &Call) -> Response<Body>;

    /// The connection changes its protocol, as the answer to `call` says.
    fn upgraded(&self, _call: &Call, _upgrade: OnUpgrade) {}

    /// An error in the server's own words.
    fn refusal(&self, status: StatusCode, code: &str) -> Response<Body>;
}

/// The server. Drop stops it, and cuts its connections.
#[derive(Debug)]
pub(super) struct Server<A> {
    answer: Arc<A>,
    faults: Faults,
    places: Vec<Place>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    listeners: Vec<TcpListener>,
}

/// A body of unknown length: what is sent, when it is sent.
struct Chunks(mpsc::Receiver<Bytes>);

// === impl Place ===

impl Place {
    /// 127.0.0.1 in the caller's own namespace, on a port that is free.
    #[must_use]
    pub fn loopback() -> Self {
        Self { netns: None, address: (Ipv4Addr::LOCALHOST, 0).into() }
    }

    /// `address` inside `netns`; port 0 takes a free one.
    #[must_use]
    pub fn inside(netns: &Netns, address: SocketAddr) -> Self {
        Self { netns: Some(netns.clone()), address }
    }

    fn listen(&self) -> Result<TcpListener> {
        let listener = match &self.netns {
            Some(netns) => netns.listen(self.address)?,
            None => TcpListener::bind(self.address)
                .with_context(|| format!("listening on {}", self.address))?,
        };
        listener.set_nonblocking(true).context("making a listener non-blocking")?;
        Ok(listener)
    }
}

// === impl Server ===

impl<A: Answer> Server<A> {
    pub(super) fn start(places: Vec<Place>, answer: Arc<A>) -> Result<Self> {
        let (faults, running) = (Faults::default(), Mutex::new(None));
        let mut server = Self { answer, faults, places, running };
        let listeners = server.listen()?;
        for (place, listener) in server.places.iter_mut().zip(&listeners) {
            place.address = listener.local_addr().context("asking for a listener's address")?;
        }
        server.run(listeners)?;
        Ok(server)
    }

    /// The address of the first place.
    pub(super) fn address(&self) -> SocketAddr {
        self.places[0].address
    }

    pub(super) fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Closes the listeners and cuts every connection.
    pub(super) fn stop(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        running.into_iter().for_each(Running::stop);
    }

    /// Listens again, on the same addresses.
    pub(super) fn restart(&self) -> Result<()> {
        self.stop();
        self.run(self.listen()?)
    }

    fn listen(&self) -> Result<Vec<TcpListener>> {
        self.places.iter().map(Place::listen).collect()
    }

    fn run(&self, listeners: Vec<TcpListener>) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("building a runtime")?;
        let (stop, stopped) = oneshot::channel();
        let kept: io::Result<_> = listeners.iter().map(TcpListener::try_clone).collect();
        let kept = kept.context("keeping a listener")?;
        let (answer, faults) = (Arc::clone(&self.answer), self.faults.clone());
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                for listener in listeners {
                    tokio::spawn(accept(listener, Arc::clone(&answer), faults.clone()));
                }
                let _ = stopped.await;
            });
        });
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        *running = Some(Running { stop, thread, listeners: kept });
        Ok(())
    }
}

// === impl Running ===

impl Running {
    fn stop(self) {
        // Closing is not enough: a child that is just being started holds copies until its exec.
        for listener in &self.listeners {
            let _ = shutdown(listener, Shutdown::Both);
        }
        // Fails only when the thread has ended already.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

impl<A> Drop for Server<A> {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        running.into_iter().for_each(Running::stop);
    }
}

async fn accept<A: Answer>(
    listener: TcpListener,
    answer: Arc<A>,
    faults: Faults,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, peer) = listener.accept().await?;
        let (answer, faults) = (Arc::clone(&answer), faults.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let upgrade = hyper::upgrade::on(&mut request);
            let (answer, faults) = (Arc::clone(&answer), faults.clone());
            async move {
                let (head, body) = request.into_parts();
                // A client that breaks off hears nothing anyway.
                let body = body.collect().await?.to_bytes();
                let call = Call::new(Request::from_parts(head, body));
                answer.note(peer, &call);
                let refusal = |status, code: &str| answer.refusal(status, code);
                let answered = faults.answer(&call, refusal, || answer.answer(&call)).await;
                if answered.status() == StatusCode::SWITCHING_PROTOCOLS {
                    answer.upgraded(&call, upgrade);
                }
                Ok::<_, hyper::Error>(answered)
            }
        });
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection.with_upgrades());
    }
}

// === impl Chunks ===

impl hyper::body::Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// A whole answer.
pub(super) fn full(
    status: StatusCode,
    content_type: &str,
    body: impl Into<Bytes>,
) -> Response<Body> {
    respond(status, content_type, Full::new(body.into()).boxed())
}

/// An answer that is sent bit by bit, until the sender is dropped.
pub(super) fn chunks(content_type: &str) -> (mpsc::Sender<Bytes>, Response<Body>) {
    let (tx, rx) = mpsc::channel(16);
    (tx, respond(StatusCode::OK, content_type, Chunks(rx).boxed()))
}

fn respond(status: StatusCode, content_type: &str, body: Body) -> Response<Body> {
    Response::builder()
        .status(status)
        .header(http::header::CONTENT_TYPE, content_type)
        .body(body)
        .expect("a status and a header of ours make an answer")
}
