//! The rules on the nodes that redirected pods to the old agent, and must go.

use super::{
    installation::{Installation, Part},
    objects::Workload,
    words::{HOST_IP, quoted},
};
use crate::peers::Program;

/// The interface where neither program's flag names one.
const INTERFACE: &str = "docker0";
/// The address of the metadata service.
const IMDS: &str = "169.254.169.254";

/// The commands that remove the old rules from a node, and what to know about them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) notes: Vec<String>,
    pub(super) commands: Vec<String>,
}

/// The rules that `installation` sets.
pub(super) fn rules(installation: &Installation) -> Rules {
    let mut rules = Rules { notes: Vec::new(), commands: Vec::new() };
    let Some(agent) = installation.agent() else {
        rules.notes.push("the agent's manifest is not in the input".to_owned());
        return rules;
    };
    if installation.has("iptables") {
        rules.notes.push(removal(installation, agent));
        if address(agent).contains("$HOST_IP") {
            rules.commands.push(
                "HOST_IP=$(kubectl get node NODE -o jsonpath='{.status.addresses[?(@.type==\"InternalIP\")].address}')"
                    .to_owned(),
            );
        }
        rules.commands.push(iptables(agent));
        rules.notes.push(
            "if iptables finds no such rule, iptables-legacy or iptables-nft may: the old image decided which".to_owned(),
        );
    }
    if installation.has("nftables") {
        rules.commands.push("nft delete table ip kube2iam".to_owned());
    }
    if rules.commands.is_empty() {
        rules.notes.push(format!(
            "the old agent sets none itself: remove what does, such as user data or a local redirect policy; \
             iptables -t nat -S | grep {IMDS} shows a rule"
        ));
    }
    rules.notes.extend(own_rules(&agent.workload, &agent.container.name));
    rules
}

/// Whether the old agent removes its rule.
fn removal(installation: &Installation, agent: &Part) -> String {
    let kept = installation.value("iptables-remove") == Some("false");
    match agent.program {
        Program::Kube2iam => "kube2iam leaves its rule on the node when it ends".to_owned(),
        _ if kept => "with --no-iptables-remove kiam leaves its rule on the node".to_owned(),
        _ => "kiam removes its rule when it ends, unless it is killed".to_owned(),
    }
}

/// The command for the rule that the old agent appends to `PREROUTING`.
fn iptables(agent: &Part) -> String {
    let value = |name: &str| agent.settings.iter().find(|it| it.name == name).map(|it| &*it.value);
    let destination = match value("metadata-addr") {
        Some(address) if !address.is_empty() => address,
        _ => IMDS,
    };
    let interface = value("host-interface").filter(|it| !it.is_empty()).unwrap_or(INTERFACE);
    // As both programs do it: an exclamation mark before the name inverts the match.
    let interface = match interface.strip_prefix('!') {
        Some(name) => format!("! -i {}", quoted(name)),
        None => format!("-i {}", quoted(interface)),
    };
    format!(
        "iptables -t nat -D PREROUTING -p tcp -d {} --dport 80 -j DNAT --to-destination {} {interface}",
        quoted(destination),
        address(agent),
    )
}

/// The address and the port that the rule leads to.
fn address(agent: &Part) -> String {
    let value = |name: &str| agent.settings.iter().find(|it| it.name == name).map(|it| &*it.value);
    let (host, port, usual) = match agent.program {
        Program::Kube2iam => (value("host-ip").or(value("bind-ip")), value("app-port"), "8181"),
        _ => (value("host"), value("port"), "3100"),
    };
    let host = match host.filter(|it| !it.is_empty() && *it != HOST_IP) {
        Some(host) => quoted(host),
        None => "\"$HOST_IP\"".to_owned(),
    };
    format!("{host}:{}", quoted(port.filter(|it| !it.is_empty()).unwrap_or(usual)))
}

/// Containers beside the old agent's that set rules by a script.
fn own_rules(workload: &Workload, agent: &str) -> Vec<String> {
    let containers = workload.init_containers.iter().chain(&workload.containers);
    let setting = containers.filter(|container| {
        let words: Vec<&str> =
            container.command.iter().chain(&container.args).map(String::as_str).collect();
        let script = words.join(" ");
        container.name != agent && script.contains(IMDS) && script.contains("iptables")
    });
    let note = |name: &str| {
        format!(
            "container {name:?} of {} sets a rule by a script of its own: undo what it does",
            workload.title()
        )
    };
    setting.map(|container| note(&container.name)).collect()
}
