//! STS: whether it answers, and whom it takes the agent for.

use super::imds;
use crate::{
    config::{Base, Config},
    sts::{self, CallerError, caller},
};
use kiam_core::{
    clock::Clock,
    preflight::{
        Check,
        Topic::{self, Sts},
    },
    role::{BaseArn, Source},
};
use kiam_requests::imds::Upstream;

/// What [`checks`] reports.
pub(super) const TOPICS: &[Topic] = &[Sts];

/// What roles are assumed with.
pub(super) struct Caller {
    pub(super) sts: sts::Config,
    pub(super) base: Option<BaseArn>,
}

/// Asks STS, and fills `found` if it may be asked for roles.
pub(super) async fn checks(
    config: &Config,
    intercepted: bool,
    found: &mut Option<Caller>,
) -> Vec<Check> {
    // The node's credentials, and what the flags leave out, come from the metadata service.
    if intercepted {
        return vec![imds::unasked(Sts)];
    }
    let upstream = Upstream::new(config.upstream.clone());
    let region = match &config.sts.region {
        Some(region) => region.clone(),
        None => match upstream.region().await {
            Ok(region) => region,
            Err(error) => {
                return vec![Check::fail(
                    Sts,
                    format!("the region is not known: {error}"),
                    "set --region, or make the metadata service answer: see imds",
                )];
            }
        },
    };
    let base = match &config.roles.base {
        Base::Given(base) => Some(base.clone()),
        Base::Absent => None,
        Base::Autodetect => match upstream.base_arn().await {
            Ok(base) => Some(base),
            Err(error) => {
                return vec![Check::fail(
                    Sts,
                    format!("the base ARN is not known (--role-base-arn-autodetect): {error}"),
                    "set --role-base-arn, or give the instance an instance profile",
                )];
            }
        },
    };
    let sts = config.sts(region);
    let asked = caller(&sts, Clock::system(), config.sts.source).await;
    let check = judge(&sts, config.sts.source, asked);
    if check.verdict == kiam_core::preflight::Verdict::Ok {
        *found = Some(Caller { sts, base });
    }
    vec![check]
}

fn judge(sts: &sts::Config, source: Source, asked: Result<Option<String>, CallerError>) -> Check {
    let region = &sts.region;
    let error = match asked {
        Ok(Some(arn)) => return Check::ok(Sts, format!("{region}: it knows this node as {arn}")),
        Ok(None) => return Check::ok(Sts, format!("{region}: it answers")),
        Err(error) => error,
    };
    let finding = format!("{region}: {error}");
    match error {
        CallerError::Credentials(_) => Check::fail(
            Sts,
            finding,
            "give the instance an instance profile whose role may assume the pods' roles: docs/installing.md, step 2",
        ),
        CallerError::Unreached(_) => Check::fail(
            Sts,
            finding,
            "can the node reach STS of the region, by a NAT gateway, a VPC endpoint (--sts-endpoint) or HTTPS_PROXY? Does its DNS answer?",
        ),
        CallerError::Rejected(_) if source == Source::Node && sts.through.is_some() => Check::fail(
            Sts,
            finding,
            "let the role of --assume-role-arn trust the node's role, and the node's role assume it",
        ),
        CallerError::Rejected(_) => {
            Check::fail(Sts, finding, "look at the node's role, and at the node's clock: see clock")
        }
        CallerError::Client(error) => Check::failed(Sts, &error, "see docs/installing.md"),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Fail, Ok as Good};

    use super::*;
    use crate::proxy::Proxies;

    #[test]
    fn each_failure_has_its_own_remedy() {
        let sts = sts::Config {
            region: "eu-west-1".to_owned(),
            endpoint: None,
            through: None,
            upstream: "http://169.254.169.254".to_owned(),
            proxies: Proxies::default(),
        };
        let text = || "x".to_owned();
        for (asked, verdict, remedy) in [
            (Ok(Some("arn:aws:sts::1:assumed-role/a/b".to_owned())), Good, None),
            (Ok(None), Good, None),
            (Err(CallerError::Credentials(text())), Fail, Some("instance profile")),
            (Err(CallerError::Unreached(text())), Fail, Some("VPC endpoint")),
            (Err(CallerError::Rejected(text())), Fail, Some("clock")),
        ] {
            let check = judge(&sts, Source::Node, asked);
            assert_eq!(check.verdict, verdict, "{check:?}");
            let shown = check.remedy.unwrap_or_default();
            assert!(remedy.is_none_or(|part| shown.contains(part)), "{shown}");
        }
        let searched = Err(CallerError::Client(sts::Error::Certificates { searched: "nowhere" }));
        let check = judge(&sts, Source::Node, searched);
        assert!(check.finding.contains("no CA certificates"), "{check:?}");
    }
}
