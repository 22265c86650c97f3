//! Taking what others need: the agent's port, and its connections.

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rustix::net::connect_unspec;

use socket2::{Domain, Protocol, Socket, Type};

/// The access key that a process on the agent's port gives out. Who gets it has been deceived.
pub const SQUATTER_ACCESS_KEY: &str = "ASIASQUATTER00000000";

/// What is occupied until it is released.
#[derive(Debug, Default)]
pub(super) struct Occupied {
    listeners: Vec<Socket>,
    /// How many came to them.
    caught: Arc<AtomicUsize>,
    connections: Vec<Socket>,
}

// === impl Occupied ===

impl Occupied {
    /// Listens at `at` and answers all requests with credentials of the squatter's own.
    pub(super) fn squat(&mut self, at: SocketAddr, reuse_port: bool) -> io::Result<()> {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if reuse_port {
            socket.set_reuse_port(true)?;
        }
        socket.bind(&at.into())?;
        socket.listen(128)?;
        let listener = socket.try_clone()?;
        self.listeners.push(socket);
        let caught = Arc::clone(&self.caught);
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                caught.fetch_add(1, Ordering::SeqCst);
                // One at a time: who hangs up early is none of ours.
                let _ = deceive(stream);
            }
        });
        Ok(())
    }

    /// Opens `count` connections to `to` without waiting for any, and holds them; how many, and how many failed.
    ///
    /// The last error is that of the whole only when none is held.
    pub(super) fn hold(&mut self, to: SocketAddr, count: u32) -> io::Result<String> {
        let mut last = Ok(());
        for _ in 0..count {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => last = Err(error),
                _ => self.connections.push(socket),
            }
        }
        let held = self.connections.len();
        if held == 0 {
            last?;
        }
        Ok(format!("{held} {}", (count as usize).saturating_sub(held)))
    }

    /// Connects `count` sockets to `to`, lets each go, and begins to connect it to the next of `then`, where nobody asks.
    pub(super) fn reconnect(
        &mut self,
        to: SocketAddr,
        then: &[SocketAddr],
        count: usize,
    ) -> io::Result<()> {
        for then in then.iter().cycle().take(count) {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            socket.connect(&to.into())?;
            connect_unspec(&socket)?;
            socket.set_nonblocking(true)?;
            // That nobody is there is what is asked for.
            let _ = socket.connect(&(*then).into());
            self.connections.push(socket);
        }
        Ok(())
    }

    /// How many of the held connections have a peer.
    pub(super) fn connected(&self) -> usize {
        self.connections.iter().filter(|socket| socket.peer_addr().is_ok()).count()
    }

    /// The oldest held connection.
    pub(super) fn oldest(&self) -> io::Result<&Socket> {
        self.connections.first().ok_or_else(|| io::Error::other("no connection is held"))
    }

    /// How many have come to the listeners.
    pub(super) fn caught(&self) -> usize {
        self.caught.load(Ordering::SeqCst)
    }

    /// Lets everything go.
    pub(super) fn release(&mut self) {
        for listener in self.listeners.drain(..) {
            // Ends the accept on its thread, which holds a descriptor of its own.
            let _ = listener.shutdown(std::net::Shutdown::Both);
        }
        self.connections.clear();
    }
}

/// Binds a stream socket and lets it go.
pub(super) fn bind(at: SocketAddr, reuse_port: bool) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_port(reuse_port)?;
    socket.bind(&at.into())
}

/// Answers as the metadata service would: a token, a role, credentials.
fn deceive(mut stream: Socket) -> io::Result<()> {
    stream.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
    let mut request = [0; 4096];
    loop {
        let length = stream.read(&mut request)?;
        if length == 0 {
            return Ok(());
        }
        let credentials = format!("{{\"AccessKeyId\":\"{SQUATTER_ACCESS_KEY}\"}}");
        let head = String::from_utf8_lossy(&request[..length]);
        let body = match head.split(' ').nth(1) {
            Some("/latest/api/token") => "token",
            Some(path) if path.ends_with("security-credentials/") => "role",
            _ => credentials.as_str(),
        };
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    }
}
