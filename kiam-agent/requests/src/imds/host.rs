//! The check of the `Host` header.
//!
//! A page in a pod's browser, or a server-side fetch, can be led here by a DNS name that changes its address. The name
//! still shows in `Host`, and only the service's own names are accepted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::{HeaderMap, Uri, Version, header};

use super::Error;
use kiam_core::role::QuotedText;

const IMDS_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
const IMDS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));
/// What nearly every request names.
const USUAL: &[u8] = b"169.254.169.254";
/// The service's names in EC2's resolvers; outside us-east-1 there is also one for each region.
const NAMES: [&str; 2] = ["instance-data", "instance-data.ec2.internal"];
const REGIONAL: (&str, &str) = ("instance-data.", ".compute.internal");

/// The hosts that requests may name.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    own: Vec<IpAddr>,
}

// === impl Hosts ===

impl Hosts {
    /// The metadata service's hosts, and the agent's `own` addresses. In kernel mode there are no own addresses, since a
    /// client that uses them was not redirected.
    pub(super) fn new(own: Vec<IpAddr>) -> Self {
        Self { own }
    }

    /// Checks `Host` and an absolute-form target.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] for a target on another host; [`Error::Host`] and [`Error::HostMissing`].
    pub(super) fn check(
        &self,
        version: Version,
        target: &Uri,
        headers: &HeaderMap,
    ) -> Result<(), Error> {
        if let Some(authority) = target.authority() {
            let http =
                target.scheme_str().is_some_and(|scheme| scheme.eq_ignore_ascii_case("http"));
            if !http || !self.accepts(authority.as_str()) {
                return Err(Error::Path);
            }
        }
        let mut hosts = headers.get_all(header::HOST).iter();
        let Some(host) = hosts.next() else {
            let optional = version < Version::HTTP_11;
            return if optional { Ok(()) } else { Err(Error::HostMissing) };
        };
        if hosts.next().is_some() {
            return Err(Error::HostMissing);
        }
        if host.as_bytes() == USUAL {
            return Ok(());
        }
        let text = String::from_utf8_lossy(host.as_bytes());
        if self.accepts(&text) { Ok(()) } else { Err(Error::Host(QuotedText::new(&text))) }
    }

    fn accepts(&self, authority: &str) -> bool {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                if port.is_empty() || port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
                    return false;
                }
                host
            }
            _ => authority,
        };
        let address = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) => v6.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        };
        match address.map(|address| address.to_canonical()) {
            Some(address) => [IMDS_V4, IMDS_V6].contains(&address) || self.own.contains(&address),
            None => NAMES.iter().any(|name| host.eq_ignore_ascii_case(name)) || is_regional(host),
        }
    }
}

/// Whether `host` is `instance-data.<region>.compute.internal`. Only AWS's resolvers answer below `compute.internal`, and
/// the region must be one label.
fn is_regional(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    let region =
        host.strip_prefix(REGIONAL.0).and_then(|rest| rest.strip_suffix(REGIONAL.1)).unwrap_or("");
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&region.len()) && region.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_service_are_accepted() {
        let kernel = Hosts::new(Vec::new());
        let source_ip = Hosts::new(vec!["10.0.0.1".parse().unwrap()]);
        let cases = [
            ("169.254.169.254", true),
            ("169.254.169.254:80", true),
            ("169.254.169.254:3100", true),
            ("[fd00:ec2::254]", true),
            ("[fd00:ec2::254]:80", true),
            ("[FD00:0EC2:0::0254]", true),
            ("[::ffff:169.254.169.254]", true),
            ("instance-data", true),
            ("Instance-Data.ec2.internal", true),
            ("instance-data:80", true),
            ("instance-data.eu-west-1.compute.internal", true),
            ("Instance-Data.us-gov-west-1.compute.internal:80", true),
            ("instance-data.compute.internal", false),
            ("instance-data..compute.internal", false),
            ("instance-data.a.b.compute.internal", false),
            ("instance-data.eu-west-1.compute.internal.evil.example", false),
            ("instance-data.eu-west-1.compute.internal.", false),
            ("evil.example/instance-data.eu-west-1.compute.internal", false),
            ("ip-10-0-0-1.eu-west-1.compute.internal", false),
            ("", false),
            (":80", false),
            ("169.254.169.254:", false),
            ("169.254.169.254:80:80", false),
            ("169.254.169.254:http", false),
            ("169.254.169.254.", false),
            ("169.254.169.254.evil.example", false),
            ("169.254.43518", false),
            ("2852039166", false),
            ("0xa9fea9fe", false),
            ("169.254.169.0376", false),
            ("fd00:ec2::254", false),
            ("[169.254.169.254]", false),
            ("user@169.254.169.254", false),
            ("169.254.169.254, evil.example", false),
            ("evil.example", false),
            ("localhost", false),
            ("127.0.0.1:3100", false),
            ("instance-data.evil.example", false),
            ("10.0.0.1:3100", false),
        ];
        for (host, accepted) in cases {
            assert_eq!(kernel.accepts(host), accepted, "{host}");
        }
        assert!(source_ip.accepts("10.0.0.1:3100") && source_ip.accepts("10.0.0.1"));
        assert!(!source_ip.accepts("10.0.0.2:3100"));
    }
}
