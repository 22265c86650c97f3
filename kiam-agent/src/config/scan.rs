//! Finds all unknown and incomplete flags, of which clap reports only the first, and adds the environment's flags.

use std::collections::HashSet;

use clap::{Arg, Command, CommandFactory as _};

use super::{Vars, flags::CommandLine, variables::Variables};

/// The flags and subcommands of kiam v2 to v4 and of kube2iam, with their replacements.
const FORMER: [(&str, &str); 62] = [
    ("agent", "run kiam-agent without a subcommand"),
    ("server", "there is no server: every node's agent calls STS itself"),
    ("health", "use kiam-agent status"),
    ("--whitelist-route-regexp", "use --allow-path, once for each path"),
    ("--allow-route-regexp", "use --allow-path, once for each path"),
    ("--server-address", "there is no server: every node's agent calls STS itself"),
    ("--server-address-refresh", "there is no server: every node's agent calls STS itself"),
    ("--bind", "there is no server: every node's agent calls STS itself"),
    ("--cert", "there is no connection that needs it"),
    ("--key", "there is no connection that needs it"),
    ("--ca", "there is no connection that needs it"),
    ("--gateway-timeout-creation", "there is no gateway"),
    ("--fetchers", "--sts-rate says how fast credentials are fetched"),
    ("--prefetch-buffer-size", "--sts-rate says how fast credentials are fetched"),
    ("--no-iptables-remove", "run kiam-agent uninstall to stop intercepting"),
    ("--iptables-remove", "run kiam-agent uninstall to stop intercepting"),
    ("--prometheus-listen-addr", "use --metrics"),
    ("--prometheus-sync-interval", "metrics are read at each scrape"),
    ("--sync", "use --sync-interval"),
    ("--session", "use --session-name, with kiam- in front, which that kiam added"),
    ("--session-refresh", "credentials are renewed at about half their life"),
    ("--disable-strict-namespace-regexp", "expressions always match whole names"),
    ("--statsd-prefix", "the prefix is kiam"),
    ("--grpc-keepalive-time-ms", "there is no connection that needs it"),
    ("--grpc-keepalive-timeout-ms", "there is no connection that needs it"),
    ("--grpc-keepalive-time-duration", "there is no connection that needs it"),
    ("--grpc-keepalive-timeout-duration", "there is no connection that needs it"),
    ("--grpc-keepalive-permit-without-stream", "there is no connection that needs it"),
    ("--pprof-listen-addr", "there is no profiler"),
    ("--base-role-arn", "use --role-base-arn"),
    ("--auto-discover-base-arn", "use --role-base-arn-autodetect"),
    ("--auto-discover-default-role", "there is no default role: annotate pods, or use --node-role"),
    ("--default-role", "there is no default role: annotate pods, or use --node-role"),
    ("--host-ip", "use --host"),
    ("--node", "use --node-name"),
    ("--app-port", "use --port"),
    ("--metrics-port", "use --metrics"),
    ("--log-level", "use --level"),
    ("--log-format", "use --json-log"),
    ("--verbose", "use --level=debug"),
    ("--iam-role-session-ttl", "use --session-duration"),
    ("--iam-role-key", "the annotation is iam.amazonaws.com/role"),
    ("--namespace-key", "the annotation is iam.amazonaws.com/allowed-roles"),
    ("--namespace-restrictions", "use --namespace-policy=required"),
    ("--namespace-restriction-format", "put expressions into iam.amazonaws.com/permitted"),
    ("--use-regional-sts-endpoint", "the region's own STS is always used"),
    ("--metadata-addr", "use --upstream"),
    ("--insecure", "--kubeconfig names the server and its certificate"),
    ("--api-server", "use --kubeconfig, or the pod's service account"),
    ("--api-token", "use --kubeconfig, or the pod's service account"),
    ("--debug", "use kiam-agent explain, and /pods on the socket in --state-dir"),
    ("--iam-external-id", "the annotation is iam.amazonaws.com/external-id"),
    ("--iam-role-session-name-key", "the annotation is iam.amazonaws.com/session-name"),
    ("--iam-enable-pod-identity-tags", "use --session-tags"),
    ("--eks-cluster-name", "use --cluster-name"),
    ("--eks-cluster-arn", "use --cluster-name; --session-tags=eks-cluster-arn=ARN adds the ARN"),
    ("--cache-resync-period", "use --sync-interval"),
    ("--cache-sync-attempts", "the agent is not ready until everything is listed, and retries"),
    ("--resolve-duplicate-cache-ips", "the kernel attests the calling pod, whatever its address"),
    ("--backoff-max-interval", "use --hold, which says how long a request waits for its pod"),
    ("--backoff-max-elapsed-time", "use --hold, which says how long a request waits for its pod"),
    ("--healthcheck-interval", "use kiam-agent status, or /live and /ready at --admin"),
];

/// The arguments that clap accepts, and the mistakes of the others.
#[derive(Debug, Default)]
pub(super) struct ScanResult {
    pub(super) arguments: Vec<String>,
    pub(super) mistakes: Vec<String>,
    /// The mistake of a subcommand that does not come first, which is reported alone.
    pub(super) misplaced: Option<String>,
    /// What the environment has instead of flags.
    pub(super) variables: Variables,
}

/// Scans `arguments` (without the program's name) for `command`, and adds flags from `vars`.
pub(super) fn scan(command: &Command, arguments: &[String], vars: &dyn Vars) -> ScanResult {
    let mut scanned =
        ScanResult { arguments: vec!["kiam-agent".to_owned()], ..ScanResult::default() };
    let mut given = HashSet::new();
    let mut words = arguments.iter().peekable();
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--") else {
            if command.find_subcommand(word).is_some() {
                scanned.misplaced = Some(format!(
                    "{word}: a subcommand comes first, before its flags: kiam-agent {word} …"
                ));
            }
            scanned.mistakes.push(unexpected(word));
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let Some(known) = find(command, name) else {
            scanned.mistakes.push(unexpected(&format!("--{name}")));
            if value.is_none() && words.peek().is_some_and(|next| !next.starts_with("--")) {
                words.next();
            }
            continue;
        };
        if !given.insert(name.to_owned()) && !repeatable(known) {
            scanned.mistakes.push(format!("--{name}: it is set more than once"));
            continue;
        }
        if value.is_some() || optional(known) {
            scanned.arguments.push(word.clone());
        } else if let Some(value) = words.next_if(|next| !next.starts_with("--")) {
            scanned.arguments.push(format!("--{name}={value}"));
        } else {
            scanned.mistakes.push(format!("--{name}: a value must follow"));
        }
    }
    let absent = command.get_arguments().filter_map(Arg::get_long);
    for flag in absent.filter(|flag| !given.contains(*flag)) {
        scanned.arguments.extend(scanned.variables.argument(flag, vars));
    }
    scanned
}

fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(name))
}

fn repeatable(arg: &Arg) -> bool {
    matches!(arg.get_action(), clap::ArgAction::Append)
}

/// Whether the flag's value is optional.
fn optional(arg: &Arg) -> bool {
    arg.get_num_args().is_some_and(|count| count.min_values() == 0)
        || !arg.get_action().takes_values()
}

fn unexpected(word: &str) -> String {
    match FORMER.iter().find(|(former, _)| *former == word) {
        Some((_, instead)) => format!("{word}: a flag of kiam or kube2iam; {instead}"),
        None if word.starts_with("--") => format!("{word}: there is no such flag"),
        None => format!("{word:?}: there is no such subcommand, but {}", subcommands()),
    }
}

fn subcommands() -> String {
    let command = CommandLine::command();
    let shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    shown.map(Command::get_name).collect::<Vec<_>>().join(", ")
}
