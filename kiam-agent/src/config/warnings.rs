//! What is allowed but should be known.

use super::{Vars, flag_names, flags::Flags, variables};

/// A sentence for each choice that someone may regret, and for each variable that is no choice.
pub(super) fn warnings(flags: &Flags, vars: &dyn Vars) -> Vec<String> {
    let choices = [
        (
            flags.iptables != "false" || flags.host_interface.is_some(),
            "--iptables and --host-interface do nothing: the kernel's own hooks intercept now",
        ),
        (
            flags.node_name.is_none(),
            "Without --node-name the pods of all nodes are watched, and credentials are prefetched only for pods of this --host",
        ),
        (
            flags.namespace_policy == "optional",
            "With --namespace-policy=optional, pods in namespaces with neither iam.amazonaws.com/permitted nor allowed-roles may have any role",
        ),
        (
            flags.mode == "observe",
            "With --mode=observe, nothing keeps pods from the node's own credentials",
        ),
        (
            flags.interceptor == "off",
            "With --interceptor=off, nothing keeps pods from the node's own credentials but what you put in front",
        ),
        (
            flags.detach_on_exit != "false",
            "With --detach-on-exit, pods have the node's own credentials once the agent has ended",
        ),
        (
            flags.allow_ip_query != "false",
            "With --allow-ip-query, whoever reaches the agent gets any pod's credentials",
        ),
    ];
    let choices = choices.into_iter().filter(|(made, _)| *made);
    let choices = choices.map(|(_, warning)| warning.to_owned());
    choices.chain(unfinished_base(flags)).chain(unknown(vars)).collect()
}

/// A base that ends in a word: kube2iam put a slash behind it, and kiam did not.
fn unfinished_base(flags: &Flags) -> Option<String> {
    let base = flags.role_base_arn.as_deref()?;
    let separated = base.ends_with(|end: char| "/-_.+=,@".contains(end));
    (!separated).then(|| {
        format!(
            "--role-base-arn={base} does not end in /, so that the annotation \"reader\" names {base}reader; if its last word is a path, write {base}/"
        )
    })
}

/// Variables that look like a flag's and are not; not those that Kubernetes sets for a Service whose name begins with kiam.
fn unknown(vars: &dyn Vars) -> Vec<String> {
    let known: Vec<String> = flag_names().iter().map(|flag| variables::name_of(flag)).collect();
    let is_link = |name: &str| name.contains("_SERVICE_") || name.contains("_PORT");
    let is_strange =
        |name: &String| name.starts_with("KIAM_") && !known.contains(name) && !is_link(name);
    let mut names: Vec<String> = vars.names().into_iter().filter(is_strange).collect();
    names.sort();
    let sentence = |name| {
        format!(
            "{name} is no flag's variable, and changes nothing; kiam-agent --help shows the flags"
        )
    };
    names.into_iter().map(sentence).collect()
}
