//! The command line for clap: names, help and defaults. Values are text here, so that all mistakes are reported at once.

use clap::{Args, Parser, Subcommand};

use kiam_core::pods::STATIC_POD_NAMESPACE;

/// Gives each pod on a Kubernetes node the credentials of its own AWS IAM role.
///
/// Each flag of the agent is also an environment variable: --node-name is KIAM_NODE_NAME.
#[derive(Debug, Parser)]
#[command(name = "kiam-agent", disable_version_flag = true, args_conflicts_with_subcommands = true)]
pub(super) struct CommandLine {
    /// A subcommand instead of the agent.
    #[command(subcommand)]
    pub(super) command: Option<Subcommands>,
    /// The flags of the agent.
    #[command(flatten)]
    pub(super) flags: Flags,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Subcommands {
    /// Detach the kernel programs and remove their pins; pods reach the node's metadata service again
    Uninstall {
        /// Folder of the pins
        #[arg(long, value_name = "DIR", default_value = BPFFS)]
        bpffs: String,
        /// Folder of the agents' sockets and token key, which are removed
        #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
        state_dir: String,
        /// The node's /etc/systemd/system, to remove the boot guard from; absent: it stays
        #[arg(long, value_name = "DIR")]
        boot_guard: Option<String>,
        /// Proceed although an agent has hung for more than 5 s; kill that agent afterwards
        #[arg(long)]
        force: bool,
    },
    /// Check what this node lacks for an agent with the given flags, and change nothing; exit 1 when a check fails, else 0
    Preflight {
        /// How to print the checks: text or json
        #[arg(long, value_name = "FORMAT", default_value = "text")]
        output: String,
        /// Role to try to assume, besides those of the node's pods (repeatable)
        #[arg(long, value_name = "ARN")]
        try_role: Vec<String>,
        /// The flags of the agent that is to run here
        #[arg(value_name = "AGENT FLAGS", trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Print the boot guard's text, for nodes whose files the agent can't write
    BootGuard {
        /// unit, script, or user-data: a script that installs both
        #[arg(value_name = "WHAT")]
        what: String,
        /// Preference of the guard's first routing rule, as the agent has it
        #[arg(long, value_name = "NUMBER", default_value = GUARD_PREFERENCE)]
        guard_preference: String,
    },
    /// The client that the self-test runs in a temporary pod
    #[command(hide = true)]
    SelftestClient,
    /// Do nothing until the container ends
    #[command(hide = true)]
    Pause,
    /// Show the state of this node's agent; exit 0 when it is ready (or alive), else 1
    Status {
        /// Only whether it is alive, for a probe
        #[arg(long)]
        live: bool,
        /// Only whether it is ready, and what is pending, for a probe
        #[arg(long, conflicts_with = "live")]
        ready: bool,
        /// How to print the page: text or json
        #[arg(long, value_name = "FORMAT", default_value = "text", conflicts_with_all = ["live", "ready"])]
        output: String,
        /// Folder of the agent's socket
        #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
        state_dir: String,
    },
    /// Show which credentials a pod of this node gets, and why; exit 0 when it gets some, else 1
    Explain {
        /// Namespace and name of the pod
        #[arg(value_name = "NAMESPACE/POD")]
        pod: String,
        /// How to print it: text or json
        #[arg(long, value_name = "FORMAT", default_value = "text")]
        output: String,
        /// Folder of the agent's socket
        #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
        state_dir: String,
    },
    /// Print what this node's agent knows of each pod, as JSON
    Pods {
        /// Folder of the agent's socket
        #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
        state_dir: String,
    },
    /// Look at the agents of all nodes, from a machine with a kubeconfig; as kubectl-kiam does
    #[command(disable_help_flag = true)]
    Ctl {
        /// A subcommand of it, with its flags; --help shows them
        #[arg(value_name = "ARGUMENTS", trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Print the agent's arguments for an installation of kiam or kube2iam, and what changes; exit 0 when nothing is left to decide, 2 when something is
    Migrate {
        /// Manifests, YAML or JSON; - is standard input; absent: the cluster is read
        #[arg(value_name = "FILE")]
        files: Vec<String>,
        /// Kubeconfig file of the cluster to read; absent: the pod's service account
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<String>,
        /// Namespace of the old DaemonSets and Deployments, where others look like them
        #[arg(long, value_name = "NAMESPACE")]
        namespace: Option<String>,
        /// Name of an old DaemonSet or Deployment, or NAMESPACE/NAME, where others look like it (repeatable)
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        name: Vec<String>,
        /// Form of the arguments: kustomize, helm or flags
        #[arg(long, value_name = "FORM", default_value = "kustomize")]
        output: String,
        /// Whether they are for an agent beside the old one (observe) or in its place (enforce)
        #[arg(long, value_name = "MODE", default_value = "enforce")]
        mode: String,
        /// Version of kiam, 1 to 4; absent: by the image's tag and the flags
        #[arg(long, value_name = "NUMBER")]
        kiam_version: Option<String>,
        /// Base of short role names for the comparison; absent: the old flag's
        #[arg(long, value_name = "ARN")]
        role_base_arn: Option<String>,
    },
    /// Renew a pod's credentials now, and show the result; exit 0 when they were issued, else 1
    Refresh {
        /// Namespace and name of the pod
        #[arg(value_name = "NAMESPACE/POD")]
        pod: String,
        /// Folder of the agent's socket
        #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
        state_dir: String,
    },
}

const BPFFS: &str = "/sys/fs/bpf/kiam";
const STATE_DIR: &str = "/run/kiam";
const GUARD_PREFERENCE: &str = "5";

/// The agent's flags.
#[derive(Debug, Args)]
pub(super) struct Flags {
    /// Address of this node that the agent listens on: one IPv4, one IPv6, or both (required)
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub(super) host: Vec<String>,
    /// Port that the agent listens on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value = "3100")]
    pub(super) port: String,
    /// Completes short role names: arn:aws:iam::123456789012:role/ (or autodetect it)
    #[arg(long, value_name = "ARN")]
    pub(super) role_base_arn: Option<String>,
    /// Take the base ARN from the node's own instance profile
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", default_value = "false")]
    pub(super) role_base_arn_autodetect: String,
    /// Node whose pods are watched; absent: all pods are
    #[arg(long, value_name = "NAME")]
    pub(super) node_name: Option<String>,
    /// Key of a taint to remove from the node once the agent is ready; needs --node-name
    #[arg(long, value_name = "KEY")]
    pub(super) startup_taint: Option<String>,
    /// Evict pods that ran before they were intercepted and may hold the node's credentials; needs --node-name
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", default_value = "false")]
    pub(super) evict_older_pods: String,
    /// Kubeconfig file; absent: the pod's service account
    #[arg(long, value_name = "FILE")]
    pub(super) kubeconfig: Option<String>,
    /// How often the pods are listed again; namespaces and ServiceAccounts at most once an hour
    #[arg(long, value_name = "DURATION", default_value = "2m")]
    pub(super) sync_interval: String,
    /// How pods' traffic is intercepted: ebpf or off
    #[arg(long, value_name = "WHAT", default_value = "ebpf")]
    pub(super) interceptor: String,
    /// Whether pods' traffic is redirected and guarded (enforce) or only counted (observe)
    #[arg(long, value_name = "MODE", default_value = "enforce")]
    pub(super) mode: String,
    /// How callers are identified: kernel or source-ip; default kernel, without interceptor source-ip
    #[arg(long, value_name = "WHAT")]
    pub(super) identity: Option<String>,
    /// How hostNetwork pods are treated: pass (as the node) or intercept (as other pods)
    #[arg(long, value_name = "WHAT", default_value = "pass")]
    pub(super) host_network_pods: String,
    /// ServiceAccount whose pods use the real metadata service (repeatable)
    #[arg(long, value_name = "NAMESPACE/SERVICEACCOUNT", value_delimiter = ',')]
    pub(super) node_role: Vec<String>,
    /// Namespaces whose mirror pods stand for static pods (repeatable)
    #[arg(long, value_name = "NAMESPACE", value_delimiter = ',', default_value = STATIC_POD_NAMESPACE)]
    pub(super) static_pod_namespaces: Vec<String>,
    /// What blocks IMDS traffic that the connect hooks cannot see: route, skb, uplink (comma separated), or none
    #[arg(long, value_name = "WHAT", value_delimiter = ',', default_value = "route")]
    pub(super) guard: Vec<String>,
    /// Preference of the guard's first routing rule; the next four are used, too
    #[arg(long, value_name = "NUMBER", default_value = GUARD_PREFERENCE)]
    pub(super) guard_preference: String,
    /// How pods' connections reach the agent: auto, pod-local (inside the pod, or not at all) or node
    #[arg(long, value_name = "PATH", default_value = "auto")]
    pub(super) path: String,
    /// How often the self-test runs; the agent is not ready while it fails
    #[arg(long, value_name = "DURATION", default_value = "1m")]
    pub(super) selftest_interval: String,
    /// The pods' cgroup; absent: it is found by the kubelet's names
    #[arg(long, value_name = "DIR")]
    pub(super) cgroup: Option<String>,
    /// The node's /etc/systemd/system, where a unit sets the route guard's rules before the kubelet starts; absent: none
    #[arg(long, value_name = "DIR")]
    pub(super) boot_guard: Option<String>,
    /// Folder for pins on a BPF file system
    #[arg(long, value_name = "DIR", default_value = BPFFS)]
    pub(super) bpffs: String,
    /// Folder for the token key and the admin socket
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub(super) state_dir: String,
    /// Time between SIGTERM and the kubelet's kill; the agent serves until another takes over, or 3 s before the end
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub(super) grace_period: String,
    /// Detach the programs at exit, unless another agent has taken over
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", default_value = "false")]
    pub(super) detach_on_exit: String,
    /// How long a request waits for its pod or credentials
    #[arg(long, value_name = "DURATION", default_value = "400ms")]
    pub(super) hold: String,
    /// Whether session tokens are optional or required
    #[arg(long, value_name = "WHAT", default_value = "optional")]
    pub(super) imdsv2: String,
    /// Metadata path that pods may read, too: exact, ending in /*, or common (repeatable)
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    pub(super) allow_path: Vec<String>,
    /// Metadata path that pods may not read, with all paths below, although it is allowed by default (repeatable)
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    pub(super) deny_path: Vec<String>,
    /// The real metadata service
    #[arg(long, value_name = "URL", default_value = "http://169.254.169.254")]
    pub(super) upstream: String,
    /// AWS region; absent: AWS_REGION, else the metadata service's
    #[arg(long, value_name = "REGION")]
    pub(super) region: Option<String>,
    /// STS endpoint instead of the region's
    #[arg(long, value_name = "URL")]
    pub(super) sts_endpoint: Option<String>,
    /// How the agent authenticates to STS: assume-role (the node's credentials) or web-identity (a token of the pod's ServiceAccount)
    #[arg(long, value_name = "WHAT", default_value = "assume-role")]
    pub(super) credential_source: String,
    /// Kubeconfig file for requests of pods' tokens, such as the kubelet's; absent: as for all other requests
    #[arg(long, value_name = "FILE")]
    pub(super) token_kubeconfig: Option<String>,
    /// Role that the node assumes first, to assume the pods' roles with it
    #[arg(long, value_name = "ARN")]
    pub(super) assume_role_arn: Option<String>,
    /// Session name, of {namespace}, {pod}, {service_account}, {node}, {cluster} and text
    #[arg(long, value_name = "TEMPLATE", default_value = "kiam-kiam")]
    pub(super) session_name: String,
    /// Source identity, of what --session-name takes; roles must allow sts:SetSourceIdentity
    #[arg(long, value_name = "TEMPLATE")]
    pub(super) source_identity: Option<String>,
    /// Tags of sessions, by EKS's names or KEY=VALUE (repeatable); roles must allow sts:TagSession
    #[arg(long, value_name = "NAME|KEY=VALUE", value_delimiter = ',')]
    pub(super) session_tags: Vec<String>,
    /// Managed policy that restricts all sessions (repeatable)
    #[arg(long, value_name = "ARN", value_delimiter = ',')]
    pub(super) session_policy: Vec<String>,
    /// Name of the cluster, for {cluster} and the tag eks-cluster-name
    #[arg(long, value_name = "NAME")]
    pub(super) cluster_name: Option<String>,
    /// Session duration to request, 15m to 12h
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    pub(super) session_duration: String,
    /// Requests that one pod may make a second, and how many at once: RATE or RATE:BURST; new connections too
    #[arg(long, value_name = "RATE[:BURST]", default_value = "200:1000")]
    pub(super) pod_rate: String,
    /// Calls to STS a second, and how many at once: RATE or RATE:BURST
    #[arg(long, value_name = "RATE[:BURST]", default_value = "10:250")]
    pub(super) sts_rate: String,
    /// Time since the Kubernetes API was last heard from after which the agent suspends calls to STS; or off
    #[arg(long, value_name = "DURATION", default_value = "24h")]
    pub(super) max_staleness: String,
    /// Whether namespaces need iam.amazonaws.com/permitted or allowed-roles: optional or required
    #[arg(long, value_name = "WHAT", default_value = "optional")]
    pub(super) namespace_policy: String,
    /// Namespaces whose pods may set iam.amazonaws.com/session-name and external-id, or * (repeatable)
    #[arg(long, value_name = "NAMESPACE", value_delimiter = ',', default_value = "*")]
    pub(super) annotation_overrides: Vec<String>,
    /// Address of /live, /ready and /metrics
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:3101")]
    pub(super) admin: String,
    /// Address of a second listener for /metrics alone
    #[arg(long, value_name = "ADDRESS")]
    pub(super) metrics: Option<String>,
    /// StatsD server, which gets kiam's metric names
    #[arg(long, value_name = "ADDRESS")]
    pub(super) statsd: Option<String>,
    /// How often StatsD metrics are sent
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    pub(super) statsd_interval: String,
    /// Where to write a line for each hand-out of credentials, with its process: log, file or off
    #[arg(long, value_name = "WHERE", default_value = "log")]
    pub(super) audit: String,
    /// File of --audit=file, in a folder where only root may write
    #[arg(long, value_name = "FILE", default_value = "/var/log/kiam/audit.log")]
    pub(super) audit_file: String,
    /// The most bytes of that file and the three older ones together, such as 64Mi
    #[arg(long, value_name = "SIZE", default_value = "64Mi")]
    pub(super) audit_file_size: String,
    /// Log JSON objects
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", default_value = "false")]
    pub(super) json_log: String,
    /// Log level: trace, debug, info, warn, error
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub(super) level: String,
    /// Identify the caller by ?ip=, too; only with --interceptor=off
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", default_value = "false")]
    pub(super) allow_ip_query: String,
    /// Does nothing: the kernel intercepts now
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", default_value = "false")]
    pub(super) iptables: String,
    /// Does nothing: no interface is involved
    #[arg(long, value_name = "NAME")]
    pub(super) host_interface: Option<String>,
}
