//! One socket, two connections: the first to the metadata service, the second elsewhere, but to the same port.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use rustix::net::connect_unspec;
use socket2::Socket;

use super::{Course, begin_connect, imds, socket};

const PAUSE: Duration = Duration::from_millis(20);
/// A loopback address that nobody else listens at.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);
/// The state of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// Makes `sockets` of them and holds them.
pub(super) fn run(course: &Course, sockets: u32, node_port: u16) -> io::Result<()> {
    let port = port_inside()?.unwrap_or(node_port);
    let elsewhere = SocketAddr::from((ELSEWHERE, port));
    let listener = TcpListener::bind(elsewhere)?;
    thread::spawn(move || listener.incoming().for_each(drop));
    // All of them are redirected before any counts, so that the first connections take no more of a quota than one does.
    let mut redirected = Vec::new();
    for _ in 0..sockets {
        if !course.goes_on() {
            break;
        }
        match disconnected() {
            Ok(socket) => redirected.push(socket),
            Err(_) => course.count("refused", 1),
        }
    }
    let mut held = Vec::new();
    for socket in redirected {
        match begin_connect(&socket, elsewhere) {
            Ok(()) => held.push(socket),
            Err(_) => course.count("refused elsewhere", 1),
        }
    }
    course.count("connected twice", held.len() as u64);
    course.in_full_swing();
    while course.goes_on() {
        // What the attacker has gained, it tries once more.
        match disconnected().and_then(|socket| begin_connect(&socket, elsewhere)) {
            Ok(()) => course.count("again", 1),
            Err(_) => course.count("refused again", 1),
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// A socket that the kernel has redirected once.
fn disconnected() -> io::Result<Socket> {
    let socket = socket()?;
    begin_connect(&socket, imds())?;
    connect_unspec(&socket)?;
    Ok(socket)
}

/// The port of what listens at 127.0.0.1 in this network namespace, where that is one: the agent's.
fn port_inside() -> io::Result<Option<u16>> {
    let table = fs::read_to_string("/proc/thread-self/net/tcp")?;
    let mut listeners = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (address, port) = fields.get(1)?.split_once(':')?;
        let inside = address == "0100007F" && fields.get(3) == Some(&LISTEN);
        inside.then(|| u16::from_str_radix(port, 16).ok()).flatten()
    });
    Ok(listeners.next_back())
}
