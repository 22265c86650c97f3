//! The self-test's entry in the table of pods' network namespaces, with a pod listener.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use kiam_common::client::Sandbox;
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    intercept::{Flows, SandboxTable},
    selftest::Witness,
    sys::namespaces::inside,
};

/// The pause after a connection that can't be accepted.
const PAUSE: Duration = Duration::from_millis(10);

/// A published entry of the self-test's namespace. Dropping it removes the entry.
pub(super) struct NamespaceEntry<'a> {
    table: &'a SandboxTable,
    netns: u64,
    sockets: Vec<TcpListener>,
}

// === impl NamespaceEntry ===

impl<'a> NamespaceEntry<'a> {
    /// Listens in `namespace`, whose cookie is `netns`, and publishes the listener for connects of the cgroup `pod`.
    pub(super) fn open(
        namespace: &File,
        (netns, pod): (u64, u64),
        table: &'a SandboxTable,
    ) -> io::Result<Self> {
        let listen = |address: IpAddr| TcpListener::bind(SocketAddr::new(address, 0));
        let v4 = inside(namespace, || listen(Ipv4Addr::LOCALHOST.into()))?;
        let mut sandbox = Sandbox { pod, v4: v4.local_addr()?.port(), ..Sandbox::default() };
        let mut sockets = vec![v4];
        // This fails where the node has no IPv6.
        if let Ok(v6) = inside(namespace, || listen(Ipv6Addr::LOCALHOST.into())) {
            sandbox.v6 = v6.local_addr()?.port();
            sockets.push(v6);
        }
        for socket in &sockets {
            socket.set_nonblocking(true)?;
        }
        table.publish(netns, sandbox, &sockets).map_err(io::Error::other)?;
        Ok(Self { table, netns, sockets })
    }

    /// Publishes the namespace of cookie `netns` without a listener, so that the cgroup `pod` can connect from it to the node
    /// listener.
    pub(super) fn without_listener(
        (netns, pod): (u64, u64),
        table: &'a SandboxTable,
    ) -> io::Result<Self> {
        let (sandbox, sockets) = (Sandbox { pod, ..Sandbox::default() }, Vec::new());
        table.publish(netns, sandbox, &sockets).map_err(io::Error::other)?;
        Ok(Self { table, netns, sockets })
    }

    /// Runs `work`, and meanwhile shows `witness` the accepted connections.
    pub(super) fn seen_by<T>(
        &self,
        witness: &Witness,
        flows: &Flows,
        work: impl FnOnce() -> T,
    ) -> io::Result<T> {
        let (over, running) = io::pipe()?;
        thread::scope(|scope| {
            // Closed by a panic too, which otherwise would have the thread wait for ever.
            let running = running;
            scope.spawn(move || {
                loop {
                    let ended = self.wait(&over);
                    self.accept(witness, flows);
                    if ended {
                        return;
                    }
                }
            });
            let done = work();
            drop(running);
            Ok(done)
        })
    }

    /// Waits for a connection, or until `over` is; whether it is, or can't be waited for.
    fn wait(&self, over: &io::PipeReader) -> bool {
        let listeners = self.sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN));
        let mut files: Vec<_> = listeners.chain([PollFd::new(over, PollFlags::empty())]).collect();
        match poll(&mut files, None) {
            // Closing the other end shows whether it is asked for or not.
            Ok(_) => files.last().is_none_or(|over| !over.revents().is_empty()),
            Err(error) => error != rustix::io::Errno::INTR,
        }
    }

    /// Accepts and closes connections. As for a pod, only connections with the kernel's entry of this namespace count.
    fn accept(&self, witness: &Witness, flows: &Flows) {
        for socket in &self.sockets {
            loop {
                let (stream, peer) = match socket.accept() {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // One that stays (EMFILE) leaves the connection in the queue, which is seen at once again.
                        if error.kind() != io::ErrorKind::WouldBlock {
                            thread::sleep(PAUSE);
                        }
                        break;
                    }
                };
                let Ok(local) = stream.local_addr() else { continue };
                if let Ok(Some(entry)) = flows.take(self.netns, peer, local) {
                    let _ = witness.saw(entry, peer);
                }
            }
        }
    }
}

impl Drop for NamespaceEntry<'_> {
    fn drop(&mut self) {
        // A failure is harmless, since no pod is in the self-test's namespace.
        let _ = self.table.withdraw(self.netns);
    }
}
