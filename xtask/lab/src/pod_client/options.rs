//! How a pod asks: the options of `lab pod-client ask`.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{IMDS_V4, IMDS_V6};

/// How to ask. Printed answers are [`Attempt`](super::Attempt)s, one JSON line each.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What to GET; absent: what an SDK does, the role's name and then its credentials.
    pub path: Option<String>,
    /// The sort of socket and address.
    #[arg(long, value_enum, default_value_t)]
    pub via: Via,
    /// An address other than the metadata service's.
    #[arg(long)]
    pub to: Option<IpAddr>,
    /// The port.
    #[arg(long, default_value_t = 80)]
    pub port: u16,
    /// The source address to bind.
    #[arg(long)]
    pub bind: Option<IpAddr>,
    /// The interface to bind the socket to.
    #[arg(long)]
    pub interface: Option<String>,
    /// A socket filter to attach first, which accepts all: the thirty-second part of this number in long instructions, and the
    /// rest in short ones. The kernel takes its memory from the socket's.
    #[arg(long)]
    pub filter: Option<u16>,
    /// Connect, and ask for nothing.
    #[arg(long)]
    pub only_connect: bool,
    /// The protocol: version 2 gets a token first.
    #[arg(long, value_enum, default_value_t)]
    pub imds: Imds,
    /// The method.
    #[arg(long, default_value = "GET")]
    pub method: String,
    /// A further header, `Name: value`.
    #[arg(long = "header")]
    pub headers: Vec<String>,
    /// How many times to ask, each on a new connection.
    #[arg(long, default_value_t = 1)]
    pub repeat: u32,
    /// Ask again and again for so many milliseconds, and at least once.
    #[arg(long)]
    pub for_ms: Option<u64>,
    /// Ask again and again until stdin ends, and once more then.
    #[arg(long)]
    pub until_eof: bool,
    /// Ask from so many threads, `repeat` times each and on until stdin ends, and print one [`Tally`](super::Tally).
    #[arg(long)]
    pub threads: Option<u32>,
    /// The pause between two attempts in milliseconds.
    #[arg(long, default_value_t = 0)]
    pub pause_ms: u64,
    /// How long a step may take in milliseconds.
    #[arg(long, default_value_t = 5000)]
    pub timeout_ms: u64,
}

/// The sort of socket and address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Via {
    /// TCP to 169.254.169.254.
    #[default]
    V4,
    /// TCP to `::ffff:169.254.169.254` from an IPv6 socket, as dual-stack runtimes do.
    V4Mapped,
    /// TCP to `fd00:ec2::254`.
    V6,
    /// One UDP datagram to 169.254.169.254.
    Udp,
}

/// The version of the metadata protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Imds {
    /// Without a token.
    V1,
    /// With one.
    #[default]
    V2,
}

// === impl Options ===

impl Default for Options {
    fn default() -> Self {
        Self {
            path: None,
            via: Via::V4,
            to: None,
            port: 80,
            bind: None,
            interface: None,
            filter: None,
            only_connect: false,
            imds: Imds::V2,
            method: "GET".to_owned(),
            headers: Vec::new(),
            repeat: 1,
            for_ms: None,
            until_eof: false,
            threads: None,
            pause_ms: 0,
            timeout_ms: 5000,
        }
    }
}

impl Options {
    /// A GET of `path`.
    #[must_use]
    pub fn get(path: &str) -> Self {
        Self { path: Some(path.to_owned()), ..Self::default() }
    }

    /// A connection, and no more.
    #[must_use]
    pub fn connect() -> Self {
        Self { only_connect: true, timeout_ms: 2000, ..Self::default() }
    }

    /// The command line that says the same.
    #[must_use]
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<String> = self.path.iter().cloned().collect();
        let mut flag = |name: &str, value: String| args.push(format!("--{name}={value}"));
        flag("via", spelling(&self.via));
        flag("imds", spelling(&self.imds));
        flag("port", self.port.to_string());
        flag("method", self.method.clone());
        flag("repeat", self.repeat.to_string());
        flag("pause-ms", self.pause_ms.to_string());
        flag("timeout-ms", self.timeout_ms.to_string());
        self.to.iter().for_each(|to| flag("to", to.to_string()));
        self.bind.iter().for_each(|bind| flag("bind", bind.to_string()));
        self.interface.iter().for_each(|interface| flag("interface", interface.clone()));
        self.filter.iter().for_each(|filter| flag("filter", filter.to_string()));
        self.headers.iter().for_each(|header| flag("header", header.clone()));
        self.for_ms.iter().for_each(|limit| flag("for-ms", limit.to_string()));
        self.threads.iter().for_each(|threads| flag("threads", threads.to_string()));
        args.extend(self.until_eof.then(|| "--until-eof".to_owned()));
        args.extend(self.only_connect.then(|| "--only-connect".to_owned()));
        args.into_iter().map(OsString::from).collect()
    }

    pub(super) fn destination(&self) -> SocketAddr {
        let standard = match self.via {
            Via::V4 | Via::V4Mapped | Via::Udp => IMDS_V4.into(),
            Via::V6 => IMDS_V6.into(),
        };
        let address = match (self.via, self.to.unwrap_or(standard)) {
            (Via::V4Mapped, IpAddr::V4(v4)) => v4.to_ipv6_mapped().into(),
            (_, address) => address,
        };
        (address, self.port).into()
    }

    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.max(1))
    }

    pub(super) fn request(&self, method: &str, path: &str, further: &str) -> String {
        let own: String = self.headers.iter().map(|header| format!("{header}\r\n")).collect();
        format!(
            "{method} {path} HTTP/1.1\r\nHost: {IMDS_V4}\r\nUser-Agent: kiam-lab\r\n{further}{own}\r\n"
        )
    }
}

/// How clap wants the value on a command line.
fn spelling(value: &impl clap::ValueEnum) -> String {
    let value = value.to_possible_value().expect("no value is hidden");
    value.get_name().to_owned()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn options_survive_their_command_line() {
        let options = Options {
            via: Via::V4Mapped,
            to: Some(IpAddr::from([127, 0, 0, 1])),
            imds: Imds::V1,
            headers: vec!["X-Forwarded-For: 10.0.0.1".to_owned()],
            for_ms: Some(5),
            until_eof: true,
            only_connect: true,
            interface: Some("lo".to_owned()),
            filter: Some(7),
            threads: Some(8),
            ..Options::get("/latest/")
        };
        let args = options.to_args();
        let line = std::iter::once("ask".into()).chain(args.clone());
        assert_eq!(Line::parse_from(line).options.to_args(), args);
        assert_eq!(options.destination(), "[::ffff:127.0.0.1]:80".parse().unwrap());
    }
}
