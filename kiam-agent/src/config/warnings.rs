//! What is allowed but should be known.

use super::flags::Flags;

/// A sentence for each choice that someone may regret.
pub(super) fn warnings(flags: &Flags) -> Vec<&'static str> {
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
    choices.into_iter().filter(|(made, _)| *made).map(|(_, warning)| warning).collect()
}
