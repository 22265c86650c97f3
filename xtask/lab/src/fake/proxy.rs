//! A proxy such as organisations have: CONNECT, and requests in absolute form. It knows names that nobody else does.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};

/// The longest head of a request.
const HEAD: usize = 16 * 1024;

/// The proxy. Drop ends it; what it has connected stays until an end closes it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

/// What it was asked for, once a connection, but for the requests in a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyRequest {
    /// `CONNECT`, or the request's own.
    pub method: String,
    /// `host:port`, or the whole URL.
    pub target: String,
    /// `Proxy-Authorization`.
    pub authorization: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    hosts: Mutex<HashMap<String, SocketAddr>>,
    seen: Mutex<Vec<ProxyRequest>>,
}

// === impl Proxy ===

impl Proxy {
    /// Starts it on loopback.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
        let address = listener.local_addr().context("asking for the address")?;
        let shared = Arc::<Shared>::default();
        let (accepts, knows) = (listener.try_clone().context("keeping it")?, shared.clone());
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = accepts.accept() {
                let knows = knows.clone();
                // A client that breaks off hears nothing anyway.
                thread::spawn(move || knows.serve(stream));
            }
        });
        Ok(Self { address, shared, listener, thread: Some(thread) })
    }

    /// Connects whoever asks for `host` to `server`, whatever the port.
    pub fn leads(&self, host: &str, server: SocketAddr) {
        let mut hosts = self.shared.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.insert(host.to_owned(), server);
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it was asked for, in order.
    #[must_use]
    pub fn seen(&self) -> Vec<ProxyRequest> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Wakes the thread, which closing alone would not.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

// === impl Shared ===

impl Shared {
    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        let (head, rest) = read_head(&mut client)?;
        let mut lines = head.split("\r\n");
        let mut words = lines.next().unwrap_or_default().split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let headers: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        let authorization = headers.iter().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("proxy-authorization").then(|| value.trim().to_owned())
        });
        let (method, target) = (method.to_owned(), target.to_owned());
        let request =
            ProxyRequest { method: method.clone(), target: target.clone(), authorization };
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        let place = target.strip_prefix("http://").unwrap_or(&target);
        let (authority, path) = place.split_once('/').unwrap_or((place, ""));
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let server = hosts.get(host).copied();
        drop(hosts);
        let Some(server) = server else {
            return client.write_all(b"HTTP/1.1 502 No such host\r\nContent-Length: 0\r\n\r\n");
        };
        let mut server = TcpStream::connect(server)?;
        if method == "CONNECT" {
            client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
        } else {
            // One request a connection.
            let own = ["proxy-", "connection:"];
            let passed = headers.iter().filter(|line| {
                let line = line.to_ascii_lowercase();
                !own.iter().any(|name| line.starts_with(name))
            });
            let passed: String = passed.map(|line| format!("{line}\r\n")).collect();
            let head = format!("{method} /{path} HTTP/1.1\r\n{passed}Connection: close\r\n\r\n");
            server.write_all(head.as_bytes())?;
        }
        server.write_all(&rest)?;
        pipe(client, server)
    }
}

/// The head, and what has come of the body.
fn read_head(client: &mut TcpStream) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), rest));
        }
        let read = client.read(&mut buffer)?;
        if read == 0 || bytes.len() > HEAD {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&buffer[..read]);
    }
}

/// Copies both ways until both ends have closed.
fn pipe(client: TcpStream, server: TcpStream) -> io::Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let upwards = thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let (mut from_server, mut to_client) = (server, client);
    let _ = io::copy(&mut from_server, &mut to_client);
    let _ = to_client.shutdown(Shutdown::Both);
    let _ = upwards.join();
    Ok(())
}
