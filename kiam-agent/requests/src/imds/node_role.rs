//! `--node-role`: pods whose connections are passed on to the real service.

use std::str::FromStr;

use kiam_core::{names, pods::Pod, role::QuotedText};

/// The pods of one service account: `<namespace>/<serviceaccount>`.
///
/// Only the operator can name them. An annotation could be set by anybody who may annotate a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRole {
    namespace: String,
    service_account: String,
}

/// Text that is not a [`NodeRole`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not a service account: expected NAMESPACE/SERVICEACCOUNT, such as kube-system/aws-node"
)]
pub struct InvalidNodeRole(QuotedText);

// === impl NodeRole ===

impl NodeRole {
    /// Whether `pod` runs as this service account.
    #[must_use]
    pub fn names(&self, pod: &Pod) -> bool {
        pod.namespace == self.namespace && pod.service_account == self.service_account
    }
}

impl FromStr for NodeRole {
    type Err = InvalidNodeRole;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidNodeRole(QuotedText::new(text));
        let (namespace, service_account) = text.split_once('/').ok_or_else(invalid)?;
        if !names::is_label(namespace) || !names::is_subdomain(service_account) {
            return Err(invalid());
        }
        let [namespace, service_account] = [namespace, service_account].map(str::to_owned);
        Ok(Self { namespace, service_account })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_that_namespaces_service_account_is_named() {
        let role: NodeRole = "kube-system/aws-node".parse().unwrap();
        let pod = |namespace: &str, account: &str| {
            let mut pod = Pod::test(1);
            namespace.clone_into(&mut pod.namespace);
            account.clone_into(&mut pod.service_account);
            pod
        };
        assert!(role.names(&pod("kube-system", "aws-node")));
        for (namespace, account) in
            [("default", "aws-node"), ("kube-system", "default"), ("kube-system", "aws-node-2")]
        {
            assert!(!role.names(&pod(namespace, account)), "{namespace}/{account}");
        }
    }

    #[test]
    fn what_kubernetes_could_not_call_so_is_refused() {
        assert!("a/cert-manager.io".parse::<NodeRole>().is_ok());
        for bad in ["", "/", "a", "a/", "/b", "a/b/c", "A/b", "a/*", "*/b", "a.b/c", "a/-b", "a/b "]
        {
            let error = bad.parse::<NodeRole>().unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("kube-system/aws-node"), "{error}");
        }
    }
}
