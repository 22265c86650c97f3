//! Requests for roles that are not the pod's.

use super::{Error, ServiceParts, route::RequestedRole};
use kiam_core::{
    pods::Pod,
    role::{QuotedText, RoleArn},
};

/// The error of a request for `requested`, which is not the current role of `pod`, but may be a former one.
pub(super) fn other_role(
    requested: &RequestedRole,
    pod: Option<&Pod>,
    parts: &ServiceParts,
) -> Error {
    let role = QuotedText::new(requested.as_str());
    let was = |pod: &Pod| former(pod, parts).any(|role| requested.names(&role));
    if pod.is_some_and(was) { Error::FormerRole(role) } else { Error::OtherRole(role) }
}

/// The former roles of `pod`.
fn former<'a>(pod: &'a Pod, parts: &'a ServiceParts) -> impl Iterator<Item = RoleArn> + 'a {
    let texts = parts.pods.former_roles(&pod.uid);
    texts.into_iter().filter_map(|text| {
        parts.policy.role(&Pod { role: Some(text), ..pod.clone() }).and_then(Result::ok)
    })
}
