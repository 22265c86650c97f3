//! Whether the roles that the node's pods want can be assumed. Issued credentials are dropped at once.

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt as _, stream};
use kiam_core::{
    clock::Clock,
    credentials::{CredentialSource, ErrorClass, SourceError},
    policy::RolePolicy,
    preflight::{Check, Topic::Roles},
    role::{Claimant, RoleArn, RoleIdentity, SessionName},
};

use super::{api::ApiReport, sts::Caller};
use crate::{config::Config, sts};

/// The most roles that are tried: enough to show that the node may assume roles at all, and few for STS.
const MOST: usize = 20;
/// Roles that are tried at once.
const AT_ONCE: usize = 4;
/// The session of a role that no pod wants.
const SESSION: &str = "kiam-agent-preflight";
/// The most failures that are shown.
const SHOWN: usize = 2;

/// Tries the roles of the node's pods, and those of `tried`.
pub(super) async fn checks(
    config: &Config,
    report: ApiReport,
    caller: Option<Caller>,
    tried: Vec<RoleArn>,
) -> Vec<Check> {
    let Some(Caller { sts, base }) = caller else {
        return vec![Check::unknown(Roles, "STS can't be asked", "see sts")];
    };
    let session = SessionName::sanitised(SESSION);
    let named = tried.into_iter().map(|role| {
        let identity =
            RoleIdentity::new(role, session.clone(), config.roles.policy.session_duration);
        (identity, Claimant::new("", SESSION))
    });
    let mut wanted: Vec<Wanted> = named.collect();
    let of_flags = wanted.len();
    let mut all = of_flags;
    let mut pod_tokens = None;
    if let Some(known) = &report.known {
        let policy = RolePolicy::new(config.policy(base), known.reader.clone());
        let of_pods = policy.wanted(&known.node_pods.filter());
        let of_pods = of_pods.iter().filter_map(|(identity, claimants)| {
            Some((identity.clone(), claimants.first()?.clone()))
        });
        let of_pods: Vec<Wanted> = of_pods.collect();
        all += of_pods.len();
        wanted.extend(in_turns(of_pods, MOST.saturating_sub(of_flags)));
        let (reader, metrics) = (known.reader.clone(), known.metrics.clone());
        let identity = config.sts.token_kubeconfig.clone();
        pod_tokens = match known.cluster.tokens(config.sts.source, identity, reader, metrics) {
            Ok(tokens) => tokens,
            Err(error) => return vec![Check::failed(Roles, &error, "see api")],
        };
    } else if of_flags == 0 {
        let finding = "the API did not say which roles the node's pods want";
        return vec![Check::unknown(Roles, finding, "see api; --try-role=ARN tries one")];
    }
    if wanted.is_empty() {
        let finding = "no pod of this node wants a role that it may have, so none was assumed";
        return vec![Check::unknown(Roles, finding, "--try-role=ARN tries one")];
    }
    match sts::source(&sts, Clock::system(), pod_tokens).await {
        Ok(source) => vec![judge(&assume(source, wanted).await, of_flags, all)],
        Err(error) => vec![Check::failed(Roles, &error, "see sts")],
    }
}

/// A role, and a pod that wants it.
type Wanted = (RoleIdentity, Claimant);

/// At most `most` of `wanted`: one of each namespace, then a second one, and so on. No tenant's roles leave out another's.
fn in_turns(wanted: Vec<Wanted>, most: usize) -> Vec<Wanted> {
    let mut namespaces: BTreeMap<String, Vec<Wanted>> = BTreeMap::new();
    for one in wanted {
        namespaces.entry(one.1.namespace.to_string()).or_default().push(one);
    }
    let mut turns: Vec<_> = namespaces.into_values().map(Vec::into_iter).collect();
    let mut chosen = Vec::new();
    while chosen.len() < most && !turns.is_empty() {
        turns.retain_mut(|of_namespace| match of_namespace.next() {
            Some(one) => {
                chosen.push(one);
                true
            }
            None => false,
        });
    }
    chosen.truncate(most);
    chosen
}

/// The role, and why it can't be assumed.
type Attempt = (RoleArn, Option<SourceError>);

async fn assume(source: Arc<dyn CredentialSource>, wanted: Vec<Wanted>) -> Vec<Attempt> {
    let attempts = wanted.into_iter().map(|(identity, claimant)| {
        let source = Arc::clone(&source);
        async move {
            let error = source.issue(&identity, &claimant).await.err();
            (identity.role, error)
        }
    });
    stream::iter(attempts).buffered(AT_ONCE).collect().await
}

/// The verdict on `attempts`, of which the first `of_flags` are of `--try-role`. Only these fail: what a pod wants is its
/// owner's choice, which must not keep the agent off the node.
fn judge(attempts: &[Attempt], of_flags: usize, all: usize) -> Check {
    let failed: Vec<_> = attempts
        .iter()
        .enumerate()
        .filter_map(|(at, (role, error))| error.as_ref().map(|error| (at, role, error)))
        .collect();
    let tried = attempts.len();
    let left_out = match all.saturating_sub(tried) {
        0 => String::new(),
        more => format!("; {more} more were not tried"),
    };
    if failed.is_empty() {
        return Check::ok(Roles, format!("assumed, and dropped again: {tried}{left_out}"));
    }
    let shown: Vec<_> = failed
        .iter()
        .take(SHOWN)
        .map(|(_, role, error)| format!("{role}: {}", error.message))
        .collect();
    let (count, shown) = (failed.len(), shown.join("; "));
    let finding = format!("{count} of {tried} can't be assumed: {shown}{left_out}");
    let denied = |of: &dyn Fn(usize) -> bool| {
        failed.iter().any(|(at, _, error)| {
            of(*at) && matches!(error.class, ErrorClass::Denied | ErrorClass::Refused)
        })
    };
    let trust = "let the roles trust the node's role, and the node's role assume them: docs/installing.md, step 2";
    if denied(&|at| at < of_flags) {
        Check::fail(Roles, finding, trust)
    } else if denied(&|_| true) {
        Check::warn(Roles, finding, trust)
    } else {
        Check::warn(Roles, finding, "this may pass: repeat the check, and see sts")
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Fail, Ok as Good, Warn};

    use super::*;

    #[test]
    fn a_role_that_is_denied_fails_only_if_the_operator_names_it() {
        let attempt = |name: &str, class: Option<ErrorClass>| -> Attempt {
            let role = format!("arn:aws:iam::123456789012:role/{name}").parse().unwrap();
            (role, class.map(|class| SourceError::new(class, "AccessDenied: no")))
        };
        let cases = [
            (None, 0, Good, "dropped again: 2; 28 more were not tried"),
            (Some(ErrorClass::Throttled), 2, Warn, "1 of 2"),
            (Some(ErrorClass::Denied), 2, Fail, "role/b: AccessDenied: no"),
            (Some(ErrorClass::Denied), 1, Warn, "role/b: AccessDenied: no; 28 more"),
        ];
        for (class, of_flags, verdict, says) in cases {
            let check = judge(&[attempt("a", None), attempt("b", class)], of_flags, 30);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.finding.contains(says), "{check:?}");
        }
    }

    #[test]
    fn a_namespace_with_many_roles_leaves_out_no_other() {
        let wanted = |namespace: &str, name: &str| {
            let role = format!("arn:aws:iam::123456789012:role/{name}").parse().unwrap();
            let session = SessionName::sanitised(SESSION);
            let identity = RoleIdentity::new(role, session, std::time::Duration::from_secs(3600));
            (identity, Claimant::new(namespace, name))
        };
        let mut all: Vec<_> = (0..40).map(|n| wanted("a-tenant", &format!("r{n}"))).collect();
        all.extend([wanted("shop", "orders"), wanted("shop", "reports"), wanted("zoo", "keeper")]);
        let chosen = |most| in_turns(all.clone(), most);
        let others = |chosen: &[Wanted]| {
            chosen.iter().filter(|(_, pod)| &*pod.namespace != "a-tenant").count()
        };
        let twenty = chosen(20);
        assert_eq!((twenty.len(), others(&twenty)), (20, 3));
        assert_eq!(others(&chosen(3)), 2);
        assert_eq!((chosen(0).len(), chosen(100).len()), (0, 43));
    }
}
