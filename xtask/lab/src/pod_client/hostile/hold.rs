//! Connections that are held: silent, slow, or with answers that nobody reads.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    thread,
    time::Duration,
};

use socket2::Socket;

use super::{Course, Sends, begin_connect, is_later, socket};

/// Between two turns, which is what a slow head's bytes have between them.
const PAUSE: Duration = Duration::from_millis(100);
const REQUEST: &[u8] =
    b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";
const SLOW: &[u8] = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nX-Slow: ";

struct Connection {
    socket: Socket,
    sent: usize,
}

/// Holds `connections` to `to`.
pub(super) fn run(
    course: &Course,
    to: SocketAddr,
    connections: u32,
    sends: Sends,
) -> io::Result<()> {
    let open = || {
        let socket = socket().ok()?;
        begin_connect(&socket, to).ok()?;
        Some(Connection { socket, sent: 0 })
    };
    let requests = REQUEST.repeat(200);
    let mut held: Vec<_> = (0..connections).map(|_| open()).collect();
    course.in_full_swing();
    while course.goes_on() {
        for place in &mut held {
            let ended = place.as_mut().is_none_or(|held| held.turn(sends, &requests).is_err());
            if ended {
                course.count("ended or refused connections", 1);
                *place = open();
            }
        }
        thread::sleep(PAUSE);
    }
    course.count("connections at the end", held.iter().flatten().count() as u64);
    Ok(())
}

// === impl Connection ===

impl Connection {
    /// Fails when the connection has ended.
    fn turn(&mut self, sends: Sends, requests: &[u8]) -> io::Result<()> {
        let sent = match sends {
            Sends::Nothing => return self.is_open(),
            Sends::SlowHead => {
                self.is_open()?;
                self.socket.write(&[SLOW.get(self.sent).copied().unwrap_or(b'x')])
            }
            // What does not fit comes in the next turn, from the start of a request where it fits.
            Sends::Requests => self.socket.write(requests),
        };
        match sent {
            Ok(length) => self.sent += length,
            Err(error) if is_later(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn is_open(&mut self) -> io::Result<()> {
        match self.socket.read(&mut [0; 1024]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if !is_later(&error) => Err(error),
            _ => Ok(()),
        }
    }
}
