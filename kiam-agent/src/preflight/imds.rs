//! The real metadata service: whether it answers, and how it is configured.

use super::clock::ServerClock;
use crate::config::{Base, Config};
use kiam_core::{
    clock::Clock,
    preflight::{
        Check,
        Topic::{self, HopLimit, Imds, ImdsTokens},
    },
    role::Source,
};
use kiam_requests::imds::{
    UpstreamError,
    probe::{HopLimit as Limit, TokenPolicy, hop_limit, profile},
};

/// What [`checks`] reports.
pub(super) const TOPICS: &[Topic] = &[Imds, ImdsTokens, HopLimit];
/// The remedy for settings of the instance's metadata options.
const OPTIONS: &str = "aws ec2 modify-instance-metadata-options --instance-id ID --http-tokens required --http-put-response-hop-limit 1";

/// Asks the service, and keeps its `clock`.
pub(super) async fn checks(
    config: &Config,
    intercepted: bool,
    clock: &mut Option<ServerClock>,
) -> Vec<Check> {
    if intercepted {
        return TOPICS.iter().map(|topic| unasked(*topic)).collect();
    }
    let url = &config.upstream;
    let profile = match profile(url).await {
        Ok(profile) => profile,
        Err(error) => return unreached(config, &error),
    };
    *clock =
        ServerClock::read("the metadata service", profile.date.as_deref(), Clock::system().now());
    let limit = match profile.tokens {
        TokenPolicy::Absent => None,
        TokenPolicy::Required | TokenPolicy::Optional => Some(hop_limit(url, &profile).await),
    };
    vec![
        Check::ok(Imds, format!("{url} answers{}", version(profile.tokens))),
        tokens(profile.tokens),
        hops(limit),
    ]
}

/// What a process can say of the service whose connections to it an agent redirects.
pub(super) fn unasked(topic: Topic) -> Check {
    Check::unknown(
        topic,
        "an agent's programs intercept this pod (--host-network-pods=intercept), so that it can't ask the real metadata service",
        "run preflight in the agent's own container: kubectl exec",
    )
}

fn version(tokens: TokenPolicy) -> &'static str {
    match tokens {
        TokenPolicy::Required | TokenPolicy::Optional => ", with session tokens (IMDSv2)",
        TokenPolicy::Absent => ", without session tokens (IMDSv1)",
    }
}

/// The service is needed for what the flags leave out.
fn unreached(config: &Config, error: &UpstreamError) -> Vec<Check> {
    let base = matches!(config.roles.base, Base::Autodetect);
    let needs_region = config.sts.region.is_none();
    let remedy = "is hostNetwork: true set for the pod, and is the endpoint on (--http-endpoint enabled)? Or does a rule on the node block 169.254.169.254?";
    let finding = error.to_string();
    let check = match (needs_region || base, config.sts.source) {
        (true, _) => Check::fail(
            Imds,
            format!(
                "{finding}; the agent takes the {} from it",
                if needs_region { "region" } else { "base ARN" }
            ),
            format!("{remedy} --region and --role-base-arn go without"),
        ),
        (false, Source::Node) => Check::warn(
            Imds,
            format!(
                "{finding}; the node's credentials come from it, unless the environment has others"
            ),
            remedy,
        ),
        (false, Source::WebIdentity) => {
            Check::warn(Imds, format!("{finding}; pods get no metadata from it"), remedy)
        }
    };
    let further = [ImdsTokens, HopLimit]
        .map(|topic| Check::unknown(topic, "the metadata service does not answer", "see imds"));
    std::iter::once(check).chain(further).collect()
}

fn tokens(policy: TokenPolicy) -> Check {
    match policy {
        TokenPolicy::Required => Check::ok(ImdsTokens, "required (HttpTokens=required)"),
        TokenPolicy::Optional => Check::warn(
            ImdsTokens,
            "requests without a session token are answered (HttpTokens=optional), over any number of hops: until the agent has started after a boot, pods can have the node's credentials",
            OPTIONS,
        ),
        TokenPolicy::Absent => Check::warn(
            ImdsTokens,
            "the service has no session tokens, so that nothing but the agent keeps pods from the node's credentials",
            "is --upstream the real metadata service? That of EC2 has tokens",
        ),
    }
}

fn hops(limit: Option<Result<Limit, UpstreamError>>) -> Check {
    match limit {
        Some(Ok(Limit::One)) => {
            Check::ok(HopLimit, "1: pods behind a hop get no session token from the service")
        }
        Some(Ok(Limit::More)) => Check::warn(
            HopLimit,
            "more than 1: until the agent has started after a boot, pods can have the node's credentials",
            format!("{OPTIONS}; --boot-guard closes the gap on the node: docs/boot.md"),
        ),
        Some(Err(error)) => Check::unknown(HopLimit, error.to_string(), "see imds"),
        None => Check::unknown(HopLimit, "there are no session tokens", "see imds-tokens"),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Ok as Good, Unknown, Warn};

    use super::*;

    #[test]
    fn what_leaves_a_gap_is_a_warning() {
        for (policy, verdict) in [
            (TokenPolicy::Required, Good),
            (TokenPolicy::Optional, Warn),
            (TokenPolicy::Absent, Warn),
        ] {
            assert_eq!(tokens(policy).verdict, verdict, "{policy:?}");
        }
        for (limit, verdict) in [
            (Some(Ok(Limit::One)), Good),
            (Some(Ok(Limit::More)), Warn),
            (Some(Err(UpstreamError::Deadline)), Unknown),
            (None, Unknown),
        ] {
            assert_eq!(hops(limit).verdict, verdict);
        }
    }
}
