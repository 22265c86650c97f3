//! Which requests take a proxy.

use http::Uri;

use crate::{cluster::ServerRoute, config::Config, sts};
use kiam_core::preflight::{Check, Topic::Proxy};

/// Judges the ways to the Kubernetes API and to STS of `region`, if that is known. Whether a proxy works is tried by their
/// own checks.
pub(super) fn check(config: &Config, region: Option<&str>) -> Check {
    let api = ServerRoute::read(&config.cluster).ok();
    let sts = sts_url(config, region);
    let by_proxy = sts.as_ref().and_then(|url| config.cluster.proxies.of(url));
    judge(api.as_ref(), by_proxy.map(|proxy| proxy.address()))
}

/// The endpoint of STS.
fn sts_url(config: &Config, region: Option<&str>) -> Option<Uri> {
    if let Some(endpoint) = &config.sts.endpoint {
        return endpoint.parse().ok();
    }
    let region = region.or(config.sts.region.as_deref())?;
    let end = if sts::partition(region) == "aws-cn" { ".cn" } else { "" };
    format!("https://sts.{region}.amazonaws.com{end}").parse().ok()
}

fn judge(api: Option<&ServerRoute>, sts: Option<&Uri>) -> Check {
    let api = api.and_then(|route| Some((&route.server, route.proxy.as_ref()?)));
    match (api, sts) {
        (Some((server, proxy)), _) => {
            let host = server.host().unwrap_or_default();
            Check::warn(
                Proxy,
                format!(
                    "the Kubernetes API at {server} is asked through the proxy {proxy}, which may cut the agent's watches"
                ),
                format!("add {host} to NO_PROXY, unless the API is reached by the proxy alone"),
            )
        }
        (None, Some(proxy)) => Check::ok(
            Proxy,
            format!(
                "STS is asked through {proxy}; the Kubernetes API and the metadata service are not"
            ),
        ),
        (None, None) => Check::ok(Proxy, "none is used"),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Ok as Good, Warn};

    use super::*;

    #[test]
    fn only_a_proxy_for_the_api_is_worth_a_warning() {
        let proxy: Uri = "http://proxy.example:3128/".parse().unwrap();
        let route = |proxy: Option<&Uri>| ServerRoute {
            server: "https://10.100.0.1:443/".parse().unwrap(),
            proxy: proxy.cloned(),
        };
        for (api, sts, verdict, says) in [
            (route(None), None, Good, "none"),
            (route(None), Some(&proxy), Good, "STS is asked through http://proxy.example:3128/"),
            (route(Some(&proxy)), Some(&proxy), Warn, "10.100.0.1"),
        ] {
            let check = judge(Some(&api), sts);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.finding.contains(says), "{check:?}");
        }
        assert_eq!(judge(None, None).verdict, Good);
    }
}
