//! Pipelining: as many requests as the sockets take, whether or not anybody reads the answers.

use std::{
    io::{self, Read as _, Write as _},
    thread,
    time::Duration,
};

use socket2::Socket;

use super::{Course, begin_connect, imds, is_later, socket};

/// After a turn in which no socket took or gave a byte.
const PAUSE: Duration = Duration::from_millis(1);

struct Connection {
    socket: Socket,
    /// Of the burst that is being written, the bytes that are written.
    written: usize,
}

/// Opens `connections`, and writes bursts of `burst` requests to each.
pub(super) fn run(course: &Course, connections: u32, burst: u32, reads: bool) -> io::Result<()> {
    let request =
        "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";
    let burst = request.repeat(burst as usize).into_bytes();
    let mut open: Vec<_> = (0..connections).filter_map(|_| connect()).collect();
    course.in_full_swing();
    while course.goes_on() {
        let mut moved = 0;
        for connection in &mut open {
            match connection.turn(&burst, reads) {
                Ok(bytes) => moved += bytes,
                Err(_) => {
                    course.count("ended connections", 1);
                    if let Some(new) = connect() {
                        *connection = new;
                    }
                }
            }
        }
        course.count("requests", (moved / request.len()) as u64);
        if moved == 0 {
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

fn connect() -> Option<Connection> {
    let socket = socket().ok()?;
    begin_connect(&socket, imds()).ok()?;
    Some(Connection { socket, written: 0 })
}

// === impl Connection ===

impl Connection {
    /// Writes what the socket takes, and reads what it has; how many bytes were written.
    fn turn(&mut self, burst: &[u8], reads: bool) -> io::Result<usize> {
        let written = match self.socket.write(&burst[self.written..]) {
            Ok(written) => written,
            Err(error) if is_later(&error) => 0,
            Err(error) => return Err(error),
        };
        self.written = (self.written + written) % burst.len();
        if reads {
            self.read()?;
        }
        Ok(written)
    }
    /// Reads what there is, and throws it away.
    fn read(&mut self) -> io::Result<()> {
        let mut answers = [0; 65_536];
        loop {
            match self.socket.read(&mut answers) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) if length == answers.len() => {}
                Ok(_) => return Ok(()),
                Err(error) if is_later(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}
