//! The flags of STS and of the credentials.

use std::path::PathBuf;

use super::{DAY, SECOND, Vars, flags::Flags, given, values::Mistakes};
use crate::sts::CHAINED;
use kiam_core::{
    credentials,
    role::{RoleIdentity, SessionName, Source},
};

/// The configuration of STS.
#[derive(Clone, Debug)]
pub struct Sts {
    /// `--region`.
    pub region: Option<String>,
    /// `--sts-endpoint`.
    pub endpoint: Option<String>,
    /// `--assume-role-arn`, with the session's name.
    pub through: Option<RoleIdentity>,
    /// `--credential-source`.
    pub source: Source,
    /// `--token-kubeconfig`.
    pub token_kubeconfig: Option<PathBuf>,
}

/// The [`Sts`]; `None` if a mistake leaves a part out.
pub(super) fn sts(flags: &Flags, vars: &dyn Vars, mistakes: &mut Mistakes) -> Option<Sts> {
    let endpoint = flags.sts_endpoint.as_ref().map(|text| mistakes.url("sts-endpoint", text));
    let region = region(flags, vars, mistakes);
    let through = flags.assume_role_arn.as_ref().map(|text| through(flags, text, mistakes));
    let (source, token_kubeconfig) = source(flags, mistakes);
    Some(Sts {
        region,
        endpoint: given(endpoint)?,
        through: given(through)?,
        source: source?,
        token_kubeconfig,
    })
}

/// The role in between, whose session has the node's name.
fn through(flags: &Flags, text: &str, mistakes: &mut Mistakes) -> Option<RoleIdentity> {
    let role = mistakes.parse("assume-role-arn", text)?;
    let node = flags.node_name.as_ref().map(|name| format!("@{name}")).unwrap_or_default();
    let name = SessionName::sanitised(&format!("kiam-agent{node}"));
    Some(RoleIdentity::new(role, name, CHAINED))
}

/// The source of credentials, and the kubeconfig for tokens.
fn source(flags: &Flags, mistakes: &mut Mistakes) -> (Option<Source>, Option<PathBuf>) {
    let words = [("assume-role", Source::Node), ("web-identity", Source::WebIdentity)];
    let source = mistakes.one_of("credential-source", &flags.credential_source, &words);
    let file = flags.token_kubeconfig.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from);
    if file.is_some() && source == Some(Source::Node) {
        mistakes.add("token-kubeconfig", "it needs --credential-source=web-identity");
    }
    let only_signed = [
        ("assume-role-arn", flags.assume_role_arn.is_some()),
        ("source-identity", flags.source_identity.is_some()),
        ("session-tags", !flags.session_tags.is_empty()),
    ];
    for (flag, _) in only_signed.iter().filter(|it| it.1 && source == Some(Source::WebIdentity)) {
        mistakes
            .add(flag, "leave it out with --credential-source=web-identity: STS takes the session from the pod's token");
    }
    (source, file)
}

/// The limits of calls to STS.
pub(super) fn credentials(flags: &Flags, mistakes: &mut Mistakes) -> Option<credentials::Config> {
    let sts_rate = mistakes.rate("sts-rate", &flags.sts_rate, 10, 10_000);
    let max_staleness = match flags.max_staleness.as_str() {
        "off" => Some(None),
        text => mistakes.duration("max-staleness", text, SECOND, DAY * 365).map(Some),
    };
    Some(credentials::Config { sts_rate: sts_rate?, max_staleness: max_staleness? })
}

fn region(flags: &Flags, vars: &dyn Vars, mistakes: &mut Mistakes) -> Option<String> {
    const VARIABLE: &str = "AWS_REGION";
    let region = flags.region.clone().or_else(|| vars.get(VARIABLE))?;
    let good = !region.is_empty()
        && region
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if !good {
        let problem = format!("{region:?} is not a region, such as eu-west-1");
        match flags.region {
            Some(_) => mistakes.add("region", problem),
            None => mistakes.0.push(format!("{VARIABLE}: {problem}")),
        }
    }
    good.then_some(region)
}
