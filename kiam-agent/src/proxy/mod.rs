//! Chooses the proxy of a connection, by the variables that Go programs read: `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.
//!
//! The rules are those of Go's `httpproxy`, which kubectl, client-go, kiam and kube2iam use, and one more: link-local
//! addresses and those of EC2's own services, which are local to the node, are never reached through a proxy.
//! <https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config>

mod no_proxy;

use std::fmt;

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

use self::no_proxy::NoProxy;

/// The proxies by destination. The default is none.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    http: Option<Proxy>,
    https: Option<Proxy>,
    no_proxy: NoProxy,
}

/// An HTTP or HTTPS proxy.
#[derive(Clone)]
pub struct Proxy {
    intercept: Intercept,
}

/// The value of a setting is not a proxy. The message hides passwords.
#[derive(Debug, thiserror::Error)]
#[error(
    "{setting}: {shown:?} is not an HTTP or HTTPS proxy, such as http://proxy.example.com:3128"
)]
pub struct InvalidProxy {
    setting: &'static str,
    shown: String,
}

// === impl Proxies ===

impl Proxies {
    /// Reads the variables. Upper case takes precedence over lower case, and empty ones are ignored.
    ///
    /// # Errors
    ///
    /// [`InvalidProxy`] for each variable that is not a proxy.
    pub fn from_vars(
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Self, Vec<InvalidProxy>> {
        let given = |names: [&'static str; 2]| {
            let values = names.into_iter().filter_map(|name| Some((name, variable(name)?)));
            values.into_iter().find(|(_, value)| !value.is_empty())
        };
        let mut wrong = Vec::new();
        let mut proxy = |names| {
            let (variable, value) = given(names)?;
            Proxy::parse(variable, &value).map_err(|error| wrong.push(error)).ok()
        };
        let https = proxy(["HTTPS_PROXY", "https_proxy"]);
        let http = proxy(["HTTP_PROXY", "http_proxy"]);
        let no_proxy = given(["NO_PROXY", "no_proxy"]).map(|(_, value)| NoProxy::parse(&value));
        if wrong.is_empty() {
            Ok(Self { http, https, no_proxy: no_proxy.unwrap_or_default() })
        } else {
            Err(wrong)
        }
    }

    /// The proxy of a connection to `destination`, if it uses one.
    #[must_use]
    pub fn of(&self, destination: &Uri) -> Option<&Proxy> {
        let (proxy, usual) = match destination.scheme_str()? {
            "https" => (self.https.as_ref()?, 443),
            "http" => (self.http.as_ref()?, 80),
            _ => return None,
        };
        let port = destination.port_u16().unwrap_or(usual);
        (!self.no_proxy.has(destination.host()?, port)).then_some(proxy)
    }

    /// The proxies of `http://` and `https://`, without regard to `NO_PROXY`.
    #[must_use]
    pub fn both(&self) -> [Option<&Proxy>; 2] {
        [self.http.as_ref(), self.https.as_ref()]
    }
}

// === impl Proxy ===

impl Proxy {
    /// Parses the value of `setting`: a proxy's URL, with or without `http://`.
    ///
    /// # Errors
    ///
    /// [`InvalidProxy`].
    pub fn parse(setting: &'static str, text: &str) -> Result<Self, InvalidProxy> {
        Self::read(text).ok_or_else(|| InvalidProxy { setting, shown: without_password(text) })
    }

    fn read(text: &str) -> Option<Self> {
        let url = match text.contains("://") {
            true => text.to_owned(),
            false => format!("http://{text}"),
        };
        let uri: Uri = url.parse().ok()?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host()?.is_empty() {
            return None;
        }
        // The parser drops an invalid port.
        let authority = uri.authority()?.as_str();
        let host_and_port = authority.rsplit_once('@').map_or(authority, |(_, rest)| rest);
        let ends_in_port = host_and_port.rsplit_once(':').is_some_and(|(_, it)| !it.ends_with(']'));
        if ends_in_port && uri.port_u16().is_none() {
            return None;
        }
        let any = Uri::from_static("http://any.invalid/");
        let intercept = Matcher::builder().all(url.as_str()).build().intercept(&any)?;
        Some(Self { intercept })
    }

    /// The address, without credentials.
    #[must_use]
    pub fn address(&self) -> &Uri {
        self.intercept.uri()
    }

    /// The value of `Proxy-Authorization`, if there are credentials.
    #[must_use]
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.intercept.basic_auth()
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxy").field(self.address()).finish()
    }
}

/// The value without credentials: nothing up to the last `@`, and nothing of an invalid port.
fn without_password(value: &str) -> String {
    let (scheme, rest) = match value.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), value),
    };
    let (user, place) = match rest.rsplit_once('@') {
        Some((_, place)) => ("…@", place),
        None => ("", rest),
    };
    let port = place.trim_end_matches('/').rsplit_once(':');
    match port {
        Some((host, port)) if !port.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("{scheme}{user}{}:…", host.split_once(':').map_or(host, |(host, _)| host))
        }
        _ => format!("{scheme}{user}{place}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Result<Proxies, Vec<InvalidProxy>> {
        let value = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Proxies::from_vars(|name| value(name).map(|(_, value)| (*value).to_owned()))
    }

    fn through(proxies: &Proxies, destination: &str) -> Option<String> {
        Some(proxies.of(&destination.parse().unwrap())?.address().to_string())
    }

    #[test]
    fn each_scheme_has_its_variable_and_upper_case_counts_first() {
        let set = [
            ("HTTPS_PROXY", ""),
            ("https_proxy", "https://tls.example:3128"),
            ("HTTP_PROXY", "plain.example:8080"),
            ("http_proxy", "http://other.example"),
        ];
        let set = proxies(&set).unwrap();
        let through = |destination| through(&set, destination);
        assert_eq!(through("https://a.example").as_deref(), Some("https://tls.example:3128/"));
        assert_eq!(through("http://a.example").as_deref(), Some("http://plain.example:8080/"));
        assert_eq!(through("ftp://a.example"), None);
        let none = proxies(&[("NO_PROXY", "a")]).unwrap();
        assert!(none.of(&"https://b.example".parse().unwrap()).is_none());
    }

    #[test]
    fn credentials_are_sent_and_never_shown() {
        let set = proxies(&[("HTTPS_PROXY", "http://us%40er:pass%3Aword@proxy.example:3128")]);
        let set = set.unwrap();
        let proxy = set.of(&"https://a.example".parse().unwrap()).unwrap();
        let sent = proxy.authorization().unwrap();
        // us@er:pass:word
        assert_eq!(sent, "Basic dXNAZXI6cGFzczp3b3Jk");
        let shown = format!("{set:?} {proxy:?}");
        assert!(!shown.contains("pass") && !shown.contains("dXNA"), "{shown}");
        assert!(shown.contains("http://proxy.example:3128"), "{shown}");
    }

    #[test]
    fn what_names_no_proxy_is_an_error_without_the_password() {
        let cases = [
            ("http://user:hunter2@", "http://…@"),
            ("http://user:hun/ter2@proxy:3128", "http://…@proxy:3128"),
            ("http://user:hunter2@proxy:port", "http://…@proxy:…"),
            ("http://user:hunter2", "http://user:…"),
            ("user:hunter2@pro xy:3128", "…@pro xy:3128"),
            ("socks5://user:hunter2@proxy:1080", "socks5://…@proxy:1080"),
            ("http://:3128", "http://:3128"),
            ("http://", "http://"),
            ("http://proxy:70000", "http://proxy:70000"),
        ];
        for (value, shown) in cases {
            let wrong = proxies(&[("HTTP_PROXY", value), ("https_proxy", value)]).unwrap_err();
            let said: Vec<String> = wrong.iter().map(ToString::to_string).collect();
            assert_eq!(said.len(), 2, "{value}: {said:?}");
            assert!(said[0].starts_with(&format!("https_proxy: {shown:?} is no")), "{said:?}");
            assert!(said[1].starts_with(&format!("HTTP_PROXY: {shown:?} is no")), "{said:?}");
            assert!(!format!("{wrong:?}{said:?}").contains("ter2"), "{said:?}");
        }
    }
}
