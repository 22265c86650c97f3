//! Requests and connections as fast as they are answered.

use std::{
    io,
    net::Ipv4Addr,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Asks, Course, begin_connect, imds, socket};
use crate::pod_client::{attack::bytes, wire};

const TIMEOUT: Duration = Duration::from_secs(2);
/// After a connect that failed, so that a refusal makes no loop of system calls only.
const PAUSE: Duration = Duration::from_millis(1);

/// Sends requests from `threads` threads.
pub(super) fn run(course: &Course, threads: u32, asks: Asks) -> io::Result<()> {
    course.in_full_swing();
    let next = AtomicU64::new(0);
    course.on_threads(threads, || {
        let mut kept = None;
        while course.goes_on() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            match ask(&mut kept, &request(asks, number)) {
                Ok(status) => course.count(&format!("answers {status}"), 1),
                Err(_) => {
                    kept = None;
                    course.count("failed requests", 1);
                    thread::sleep(PAUSE);
                }
            }
        }
    });
    Ok(())
}

/// Sends echo requests by a raw socket.
pub(super) fn ping(course: &Course) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    // No answer is read, whoever it would come to.
    let (echo, to) = (bytes::echo(Ipv4Addr::UNSPECIFIED.into(), imds().ip()), imds().into());
    course.in_full_swing();
    while course.goes_on() {
        course.count(if socket.send_to(&echo, &to).is_ok() { "sent" } else { "denied" }, 1);
    }
    Ok(())
}

fn ask(kept: &mut Option<Socket>, request: &str) -> io::Result<u16> {
    let stream = match kept {
        Some(stream) => stream,
        None => kept.insert(open()?),
    };
    let reply = wire::exchange(stream, request)?;
    if reply.headers.get("connection").is_some_and(|value| value == "close") {
        *kept = None;
    }
    Ok(reply.status)
}

fn open() -> io::Result<Socket> {
    let stream = socket()?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.connect(&imds().into())?;
    Ok(stream)
}

fn request(asks: Asks, number: u64) -> String {
    let get = |path: &str, further: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{further}\r\n")
    };
    let role = format!("/latest/meta-data/iam/security-credentials/other-{number}");
    match asks {
        Asks::Tokens => {
            "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 0\r\n\
            X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n"
                .to_owned()
        }
        Asks::Refused if number.is_multiple_of(2) => get(&role, ""),
        Asks::Refused => get(&format!("/latest/user-data/{number}"), ""),
        Asks::Reconnecting => {
            get("/latest/meta-data/iam/security-credentials/", "Connection: close\r\n")
        }
    }
}

/// Opens and closes connections from `threads` threads, one in two without waiting for its handshake.
pub(super) fn churn(course: &Course, threads: u32, interface: Option<&str>) -> io::Result<()> {
    course.in_full_swing();
    let next = AtomicU64::new(0);
    course.on_threads(threads, || {
        while course.goes_on() {
            let waits = next.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
            match open_and_close(interface, waits) {
                Ok(()) => course.count("connections", 1),
                Err(_) => {
                    course.count("failed connects", 1);
                    thread::sleep(PAUSE);
                }
            }
        }
    });
    Ok(())
}

fn open_and_close(interface: Option<&str>, waits: bool) -> io::Result<()> {
    let stream = socket()?;
    if let Some(interface) = interface {
        stream.bind_device(Some(interface.as_bytes()))?;
    }
    if !waits {
        return begin_connect(&stream, imds());
    }
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.connect(&imds().into())
}
