//! A server that does nothing but answer: what `cargo xtask bench agent` compares the agent with.
//!
//! It is hyper as the agent has it, from the same lock file and by the same profile, with the same headers and bodies. It
//! knows nobody, checks nothing, counts nothing and limits nothing.

use std::{convert::Infallible, env, io, process::ExitCode};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [address, role, credentials] = arguments.as_slice() else {
        eprintln!("usage: bare ADDRESS ROLE CREDENTIALS");
        return ExitCode::FAILURE;
    };
    let bodies = (Bytes::from(role.clone()), Bytes::from(credentials.clone()));
    match serve(address, bodies).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{address}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Answers at `address` with the name of a role and its credentials, for ever.
async fn serve(address: &str, (role, credentials): (Bytes, Bytes)) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(connection(stream, role.clone(), credentials.clone()));
    }
}

async fn connection(stream: TcpStream, role: Bytes, credentials: Bytes) {
    let answer = service_fn(|request: Request<Incoming>| {
        let body = if request.uri().path() == LIST { &role } else { &credentials };
        let response = respond(body.clone());
        async move { Ok::<_, Infallible>(response) }
    });
    // A client that goes away is no news.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}

fn respond(body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(header::SERVER, HeaderValue::from_static("EC2ws"));
    response
}
