//! Parses values, and collects mistakes with the flag, the value and an example.

use std::{fmt::Display, net::IpAddr, path::PathBuf, str::FromStr, time::Duration};

use super::{Vars, flags::Flags};
use crate::proxy::Proxies;
use kiam_core::{
    names::is_label,
    policy::AnnotationOverrides,
    rate::Rate,
    role::{Location, NameTemplate},
};
use kiam_kernel::{guard::GuardConfig, intercept::HostNetworkPods};

/// The mistakes so far, which are reported at once.
#[derive(Debug, Default)]
pub(super) struct Mistakes(pub(super) Vec<String>);

/// The node's addresses, at most one of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    /// The IPv4 address.
    pub v4: Option<std::net::Ipv4Addr>,
    /// The IPv6 address.
    pub v6: Option<std::net::Ipv6Addr>,
}

// === impl Hosts ===

impl Hosts {
    /// The addresses that are set.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

// === impl Mistakes ===

impl Mistakes {
    pub(super) fn add(&mut self, flag: &str, problem: impl Display) {
        self.0.push(format!("--{flag}: {problem}"));
    }

    /// Parses `text`, or adds a mistake.
    pub(super) fn parse<T: FromStr<Err: Display>>(&mut self, flag: &str, text: &str) -> Option<T> {
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.add(flag, format!("{text:?}: {error}"));
                None
            }
        }
    }

    /// `--port`.
    pub(super) fn port(&mut self, text: &str) -> Option<u16> {
        let port = text.parse().ok();
        if port.is_none() {
            self.add("port", format!("{text:?} is not a port (0 to 65535)"));
        }
        port
    }

    /// Parses each text, or adds a mistake; `None` if one is wrong.
    pub(super) fn all<T: FromStr<Err: Display>>(
        &mut self,
        flag: &str,
        texts: &[String],
    ) -> Option<Vec<T>> {
        // Collected twice, so that every mistake is found.
        let values: Vec<Option<T>> = texts.iter().map(|text| self.parse(flag, text)).collect();
        values.into_iter().collect()
    }

    /// The value of `result`, or adds a mistake.
    pub(super) fn ok<T>(&mut self, flag: &str, result: Result<T, impl Display>) -> Option<T> {
        result.map_err(|error| self.add(flag, error)).ok()
    }

    /// A template of names.
    pub(super) fn template(
        &mut self,
        flag: &str,
        text: &str,
        location: &Location,
    ) -> Option<NameTemplate> {
        let template = NameTemplate::parse(text, location);
        self.ok(flag, template.map_err(|error| format!("{text:?}: {error}")))
    }

    /// One of `words`.
    pub(super) fn one_of<T: Copy>(
        &mut self,
        flag: &str,
        text: &str,
        words: &[(&str, T)],
    ) -> Option<T> {
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.add(flag, format!("{text:?} is not one of {}", known.join(", ")));
        }
        found
    }

    pub(super) fn switch(&mut self, flag: &str, text: &str) -> bool {
        self.one_of(flag, text, &[("true", true), ("false", false)]).unwrap_or_default()
    }

    /// A duration within `least..=most`, such as `400ms` or Go's `2m0s`.
    pub(super) fn duration(
        &mut self,
        flag: &str,
        text: &str,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        match humantime::parse_duration(text) {
            Ok(duration) if (least..=most).contains(&duration) => Some(duration),
            Ok(_) => {
                self.add(
                    flag,
                    format!("{text:?} is not between {} and {}", show(least), show(most)),
                );
                None
            }
            Err(_) => {
                self.add(flag, format!("{text:?} is not a duration, such as 400ms, 10s, 2m or 1h"));
                None
            }
        }
    }

    /// `<rate>` or `<rate>:<burst>`: up to `most` times a second, and at once. The default burst is that of `seconds`.
    pub(super) fn rate(&mut self, flag: &str, text: &str, seconds: u32, most: u32) -> Option<Rate> {
        let (rate, burst) = match text.split_once(':') {
            Some((rate, burst)) => (rate, Some(burst)),
            None => (text, None),
        };
        let number = |text: &str| text.parse().ok().filter(|n| (1..=most).contains(n));
        let rate: Option<u32> = number(rate);
        let burst = burst.map_or(rate.map(|rate| rate * seconds), number);
        if rate.is_none() || burst.is_none() {
            self.add(flag, format!("{text:?} is not a rate (1 to {most}), such as 10 or 10:100"));
        }
        Some(Rate::per_second(rate?, burst?))
    }

    /// An absolute path.
    pub(super) fn folder(&mut self, flag: &str, text: &str) -> Option<PathBuf> {
        let path = PathBuf::from(text);
        if path.is_absolute() {
            return Some(path);
        }
        self.add(flag, format!("{text:?} is not an absolute path"));
        None
    }

    /// The `http://` or `https://` URL of a server, without a path.
    pub(super) fn url(&mut self, flag: &str, text: &str) -> Option<String> {
        let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        let good = rest.is_some_and(|rest| {
            !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'@')
        });
        if !good {
            self.add(flag, format!("{text:?} is not a URL, such as http://127.0.0.1:5000"));
        }
        good.then(|| text.trim_end_matches('/').to_owned())
    }

    /// The addresses of `--host`.
    pub(super) fn hosts(&mut self, texts: &[String]) -> Hosts {
        let mut hosts = Hosts::default();
        if texts.is_empty() {
            self.add("host", "it is required: the address of this node, such as --host=10.0.0.1");
        }
        for text in texts {
            let repeated = match text.parse::<IpAddr>() {
                Ok(address) if address.is_unspecified() || address.is_multicast() => {
                    self.add("host", format!("{text:?} is not an address of one node"));
                    false
                }
                Ok(IpAddr::V4(v4)) => hosts.v4.replace(v4).is_some(),
                Ok(IpAddr::V6(v6)) => hosts.v6.replace(v6).is_some(),
                Err(_) => {
                    self.add("host", format!("{text:?} is not an IP address"));
                    false
                }
            };
            if repeated {
                self.add("host", format!("{text:?}: another address of its family is set"));
            }
        }
        hosts
    }

    /// `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.
    pub(super) fn proxies(&mut self, vars: &dyn Vars) -> Option<Proxies> {
        let proxies = Proxies::from_vars(|name| vars.get(name));
        proxies.map_err(|wrong| self.0.extend(wrong.iter().map(ToString::to_string))).ok()
    }

    /// Names of namespaces.
    pub(super) fn names(&mut self, flag: &str, texts: &[String]) -> Vec<String> {
        for text in texts.iter().filter(|text| !is_label(text)) {
            self.add(flag, format!("{text:?} is not the name of a namespace, such as kube-system"));
        }
        texts.to_vec()
    }

    /// Names of namespaces, or `*` for all of them.
    pub(super) fn overrides(&mut self, flag: &str, texts: &[String]) -> AnnotationOverrides {
        if texts == ["*"] {
            return AnnotationOverrides::Everywhere;
        }
        AnnotationOverrides::In(self.names(flag, texts).into_iter().collect())
    }

    /// The preference of the guard's first rule.
    pub(super) fn guard_preference(&mut self, text: &str) -> Option<u32> {
        // 0 is the local table's, and 32766 the main one's; the guard uses five.
        let preference = text.parse().ok().filter(|preference| (1..=32_761).contains(preference));
        if preference.is_none() {
            let problem = "is not a number from 1 to 32761, below those of the CNI's rules";
            self.add("guard-preference", format!("{text:?} {problem}"));
        }
        preference
    }

    /// `--guard` and `--guard-preference`. Only the uplink guard sees the packet sockets of hostNetwork pods, so that it is
    /// on if those are intercepted, unless all guards are off.
    pub(super) fn guard(
        &mut self,
        flags: &Flags,
        host_network: Option<HostNetworkPods>,
    ) -> Option<GuardConfig> {
        let preference = self.guard_preference(&flags.guard_preference);
        if flags.guard == ["none"] {
            return Some(GuardConfig::default());
        }
        let uplink = host_network == Some(HostNetworkPods::Intercept);
        let mut config = GuardConfig { uplink, ..GuardConfig::default() };
        for part in &flags.guard {
            match part.as_str() {
                "route" => config.route = preference,
                "skb" => config.skb = true,
                "uplink" => config.uplink = true,
                "none" => self.add("guard", "none excludes the others"),
                _ => self.add("guard", format!("{part:?} is not one of route, skb, uplink, none")),
            }
        }
        preference.map(|_| config)
    }

    pub(super) fn host_network(&mut self, text: &str) -> Option<HostNetworkPods> {
        let words = [("pass", HostNetworkPods::Pass), ("intercept", HostNetworkPods::Intercept)];
        self.one_of("host-network-pods", text, &words)
    }
}

fn show(duration: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(duration)
}
