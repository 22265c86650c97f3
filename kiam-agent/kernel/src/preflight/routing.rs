//! Whether the guard holds: routing rules, the way of pods' packets, and uplinks.

use std::{io, net::IpAddr};

use super::{Config, listed};
use crate::{
    guard::{GuardConfig, Reach, imds_addresses, rules_before, try_from_pods, uplinks},
    identity::interface_addresses,
    sys::{Cgroup, hooks::Hook, rejection::kernel_release},
};
use kiam_core::{
    blocking::Blocking,
    preflight::{
        Check,
        Topic::{RouteGuard, RoutingRules, Uplink},
    },
};

/// The index of the loopback interface, the first of each network namespace.
const LOOPBACK: u32 = 1;

pub(super) fn checks(blocking: &Blocking, node: &Config) -> Vec<Check> {
    let Some(config) = node.enforcing() else { return Vec::new() };
    let mut checks = Vec::new();
    if let Some(preference) = config.guard.route {
        checks.push(routing_rules(preference));
    }
    checks.push(match Cgroup::open(blocking, config.cgroup.as_deref()) {
        Ok(cgroup) => route_guard(blocking, config.guard, &cgroup, node.is_hooked(&cgroup)),
        Err(_) => Check::unknown(RouteGuard, "the pods' cgroup is not known", "see cgroup"),
    });
    if config.guard.uplink {
        checks.push(uplink());
    }
    checks
}

fn routing_rules(preference: u32) -> Check {
    let mut before = Vec::new();
    for address in imds_addresses() {
        match rules_before(address, preference) {
            Ok(rules) => before.extend(rules),
            Err(error) if is_family_off(&error) && address.is_ipv6() => {}
            Err(error) => return unreadable(address, &error),
        }
    }
    match before.is_empty() {
        true => Check::ok(
            RoutingRules,
            format!("no rule comes before the guard's, {preference} to {}", preference + 4),
        ),
        false => Check::warn(
            RoutingRules,
            format!(
                "rules before the guard's at {}, by which pods' packets may get past it: {}",
                preference + 3,
                listed(&before, 3)
            ),
            "choose a --guard-preference below those; `ip rule` and `ip -6 rule` list them",
        ),
    }
}

fn is_family_off(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

fn unreadable(address: IpAddr, error: &io::Error) -> Check {
    if is_family_off(error) {
        return Check::fail(
            RoutingRules,
            format!("kernel {} has no routing rules for {address}", kernel_release()),
            "choose a kernel with CONFIG_IP_MULTIPLE_TABLES, or --guard without route",
        );
    }
    let finding = format!("the routing rules for {address} can't be read: {error}");
    Check::unknown(RoutingRules, finding, "see capabilities and seccomp")
}

fn route_guard(blocking: &Blocking, guard: GuardConfig, cgroup: &Cgroup, hooked: bool) -> Check {
    if guard == GuardConfig::default() {
        return Check::warn(
            RouteGuard,
            "--guard=none: nothing stops packets to the metadata service that the connect hooks can't see",
            "leave --guard out, or name parts of the guard",
        );
    }
    if guard.route.is_none() {
        return Check::ok(RouteGuard, "it is off: --guard has other parts");
    }
    let passage = try_from_pods(blocking, cgroup.path(), &interface_addresses(), hooked);
    if hooked && passage.reach == Reach::Unknown {
        return Check::unknown(
            RouteGuard,
            "an agent's programs intercept this pod, so that it can't be tried from here",
            "kiam-agent status in the agent's pod says whether the route guard holds",
        );
    }
    judge(passage.reach, passage.pods, guard.uplink)
}

fn judge(reach: Reach, pods: usize, has_uplink: bool) -> Check {
    match (reach, pods) {
        (Reach::Holds, pods) => Check::ok(
            RouteGuard,
            format!("packets of pods pass the node's routing; pods that were tried: {pods}"),
        ),
        (Reach::Open, _) if has_uplink => Check::warn(
            RouteGuard,
            "packets of pods bypass the node's routing, so that --guard=uplink alone stops them",
            "nothing, if uplink is ok; set the instances' hop limit to 1 as well",
        ),
        // Never a failure: a pod with rules of its own, such as a mesh's sidecar, may answer for the service, and no node is
        // safer without an agent, which tries this again on itself.
        (Reach::Open, _) => Check::warn(
            RouteGuard,
            "packets of a pod bypass the node's routing and its rules, and something answers them as the metadata service",
            "use --guard=route,uplink, and set the instances' hop limit to 1: docs/guard.md",
        ),
        (Reach::Unknown, 0) => Check::unknown(
            RouteGuard,
            "no pod with a network of its own runs here, from which it could be tried",
            "repeat this when one runs; an agent tries it every minute",
        ),
        (Reach::Unknown, _) => Check::unknown(
            RouteGuard,
            "no router answered to packets from pods",
            "with Cilium, ipvlan or SR-IOV use --guard=route,uplink: docs/guard.md",
        ),
    }
}

/// Tries the uplink guard's hook at the loopback interface, where its program would see nothing of pods.
fn uplink() -> Check {
    let names = match uplinks() {
        Ok(uplinks) => uplinks.into_iter().map(|uplink| uplink.name).collect::<Vec<_>>(),
        Err(error) => {
            let finding = format!("the node's routes can't be read: {error}");
            return Check::unknown(Uplink, finding, "see capabilities and seccomp");
        }
    };
    if names.is_empty() {
        return Check::warn(
            Uplink,
            "the node has no route to the metadata service, so that there is no uplink to guard yet",
            "look at `ip route get 169.254.169.254 ipproto tcp` on the node",
        );
    }
    match Hook::TCX_EGRESS.try_at(LOOPBACK) {
        Ok(()) => Check::ok(Uplink, format!("{} can be guarded", listed(&names, 4))),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Check::unknown(
            Uplink,
            format!(
                "kernel {} has no tcx (6.6 has): a filter of clsact is used at {}, and was not tried, as that adds a qdisc",
                kernel_release(),
                listed(&names, 4)
            ),
            "make sure that the modules sch_ingress and cls_bpf can be loaded: modprobe -n cls_bpf",
        ),
        Err(error) => Check::fail(
            Uplink,
            format!("no program can be attached to an interface: {error}"),
            "see capabilities and seccomp; --guard=route goes without",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Fail, Ok as Good, Unknown, Warn};

    use super::*;

    #[test]
    fn what_one_pod_shows_is_never_a_failure() {
        let cases = [
            (Reach::Holds, 1, false, Good),
            (Reach::Open, 1, false, Warn),
            (Reach::Open, 1, true, Warn),
            (Reach::Unknown, 0, false, Unknown),
            (Reach::Unknown, 3, true, Unknown),
        ];
        for (reach, pods, has_uplink, verdict) in cases {
            assert_eq!(judge(reach, pods, has_uplink).verdict, verdict, "{reach:?} {pods}");
        }
    }

    #[test]
    fn a_kernel_without_rules_is_told_from_one_that_does_not_say() {
        let errno = io::Error::from_raw_os_error;
        let [v4, _] = imds_addresses();
        assert_eq!(unreadable(v4, &errno(libc::EAFNOSUPPORT)).verdict, Fail);
        assert_eq!(unreadable(v4, &errno(libc::EPERM)).verdict, Unknown);
    }
}
