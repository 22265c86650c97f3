//! Warnings about risky flags and unknown variables.

use super::{Config, Vars, flag_names, flags::Flags, variables};
use kiam_core::policy::NamespacePolicy;

/// A sentence for each risky flag and each unknown variable.
pub(super) fn warnings(config: &Config, flags: &Flags, vars: &dyn Vars) -> Vec<String> {
    let choices = [
        (
            flags.iptables != "false" || flags.host_interface.is_some(),
            "--iptables and --host-interface do nothing: the kernel's own hooks intercept now",
        ),
        (
            config.cluster.node_name.is_none(),
            "Without --node-name the pods of all nodes are watched, and credentials are prefetched only for pods of this --host",
        ),
        (
            config.roles.policy.namespaces == NamespacePolicy::Optional,
            "With --namespace-policy=optional, pods in namespaces with neither iam.amazonaws.com/permitted nor allowed-roles may have any role",
        ),
        (
            config.observes(),
            "With --mode=observe, nothing keeps pods from the node's own credentials",
        ),
        (
            config.intercept.is_none(),
            "With --interceptor=off, nothing but your own interception keeps pods from the node's own credentials",
        ),
        (
            config.detach_on_exit,
            "With --detach-on-exit, pods get the node's own credentials after the agent has ended",
        ),
        (
            config.imds.allow_ip_query,
            "With --allow-ip-query, any client of the agent gets any pod's credentials",
        ),
    ];
    let choices = choices.into_iter().filter(|(risky, _)| *risky);
    let choices = choices.map(|(_, warning)| warning.to_owned());
    choices.chain(unfinished_base(flags)).chain(unknown(vars)).collect()
}

/// A warning about a base that ends in a word: kube2iam added a slash, and kiam did not.
fn unfinished_base(flags: &Flags) -> Option<String> {
    let base = flags.role_base_arn.as_deref()?;
    let separated = base.ends_with(|end: char| "/-_.+=,@".contains(end));
    (!separated).then(|| {
        format!(
            "--role-base-arn={base} does not end in /, so that the annotation \"reader\" names {base}reader; if its last word is a path, write {base}/"
        )
    })
}

/// Warnings about unknown `KIAM_` variables, except those that Kubernetes sets for Services whose names begin with kiam.
fn unknown(vars: &dyn Vars) -> Vec<String> {
    let known: Vec<String> = flag_names().iter().map(|flag| variables::name_of(flag)).collect();
    let is_link = |name: &str| name.contains("_SERVICE_") || name.contains("_PORT");
    let is_strange =
        |name: &String| name.starts_with("KIAM_") && !known.contains(name) && !is_link(name);
    let mut names: Vec<String> = vars.names().into_iter().filter(is_strange).collect();
    names.sort();
    let sentence = |name| {
        format!(
            "{name} is not the variable of a flag, and has no effect; kiam-agent --help shows the flags"
        )
    };
    names.into_iter().map(sentence).collect()
}
