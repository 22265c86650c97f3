//! Flags whose values are others here, or whose fate depends on the value.

use std::{net::IpAddr, time::Duration};

use super::{OTHER_PORT, PORT, PeerFlag, Translator, Verdict};
use crate::{
    migrate::{
        installation::Part,
        route::{Routes, routes},
        words::{HOST_IP, Setting},
    },
    peers::Program,
};
use kiam_core::pods::annotations::{ALLOWED_ROLES, EXTERNAL_ID, ROLE, SESSION_NAME};

/// The shortest and the longest session of STS.
const SHORTEST: Duration = Duration::from_secs(900);
const LONGEST: Duration = Duration::from_secs(43_200);
/// The tags that EKS Pod Identity sets, but for the cluster's ARN.
const POD_IDENTITY_TAGS: [&str; 5] = [
    "eks-cluster-name",
    "kubernetes-namespace",
    "kubernetes-service-account",
    "kubernetes-pod-name",
    "kubernetes-pod-uid",
];
/// kube2iam's port, and that of its metrics.
const KUBE2IAM_PORT: &str = "8181";

impl Translator<'_> {
    /// What becomes of a flag that the table alone does not decide.
    pub(super) fn special(
        &mut self,
        part: &Part,
        setting: &Setting,
        flag: &PeerFlag,
    ) -> Option<Verdict> {
        if let Some(verdict) = self.node(setting, flag) {
            return Some(verdict);
        }
        if let Some(verdict) = self.reports(part, setting) {
            return Some(verdict);
        }
        self.roles(setting, flag).or_else(|| self.sessions(setting))
    }

    /// Flags about the node, its network and its metadata service.
    fn node(&mut self, setting: &Setting, flag: &PeerFlag) -> Option<Verdict> {
        let value = setting.value.as_str();
        Some(match setting.name.as_str() {
            "host" => Verdict::kept_as(format!("--host={HOST_IP}, the node's address")),
            "host-ip" | "bind-ip" => {
                Verdict::renamed(format!("--host={HOST_IP}, the node's address"))
            }
            "node" => Verdict::renamed("--node-name=$(NODE_NAME)"),
            "port" | "app-port" => self.port(value),
            "allow-ip-query" => Verdict::no_equal(
                "it needs --interceptor=off here, which leaves pods the node's credentials: leave it out",
            ),
            "kubeconfig" | "api-server" | "api-token" => Verdict::unneeded(
                "the agent uses its pod's service account; --kubeconfig takes a file that you mount",
            ),
            "iptables" => Verdict::unneeded(format!("{}; see the rule below", flag.advice)),
            "nftables" => Verdict::unneeded(format!("{}; see the table below", flag.advice)),
            "whitelist-route-regexp" | "allow-route-regexp" => self.paths(value),
            "metadata-addr" if value == "169.254.169.254" => {
                Verdict::unneeded("it is the agent's own value")
            }
            "metadata-addr" => {
                let url = format!("http://{}", value.trim_start_matches("http://"));
                self.settings.set("upstream", &url);
                Verdict::renamed(format!("--upstream={url}"))
            }
            _ => return None,
        })
    }

    /// Flags about the log and metrics.
    fn reports(&mut self, part: &Part, setting: &Setting) -> Option<Verdict> {
        let value = setting.value.as_str();
        Some(match setting.name.as_str() {
            "version" => Verdict::unneeded("with it the program only prints its version"),
            "debug" if part.program == Program::Kiam => self.level("debug"),
            "verbose" => self.level("debug"),
            "log-level" => self.log_level(value),
            "log-format" if value.eq_ignore_ascii_case("json") => {
                self.settings.switch("json-log");
                Verdict::renamed("--json-log")
            }
            "log-format" => Verdict::unneeded("text is the agent's own format"),
            "statsd" => self.statsd(part, value),
            "statsd-prefix" if value == "kiam" => Verdict::unneeded("it is the agent's prefix"),
            "statsd-prefix" => {
                Verdict::no_equal("the agent's metrics are named kiam.*: change what reads them")
            }
            "prometheus-listen-addr" | "metrics-port" | "metrics-bind-ip" => {
                self.metrics(part, &setting.name, value)
            }
            _ => return None,
        })
    }

    /// Flags about who may have which role, and about annotations.
    fn roles(&mut self, setting: &Setting, flag: &PeerFlag) -> Option<Verdict> {
        let value = setting.value.as_str();
        Some(match setting.name.as_str() {
            "role-base-arn" if self.installation.has("role-base-arn-autodetect") => {
                Verdict::unneeded("--role-base-arn-autodetect counts")
            }
            "base-role-arn" => self.base(value),
            "auto-discover-default-role" => {
                self.settings.switch("role-base-arn-autodetect");
                Verdict::no_equal(format!(
                    "{}; the base ARN is taken from the node by --role-base-arn-autodetect",
                    flag.advice
                ))
            }
            "assume-role-arn" if !value.starts_with("arn:") => Verdict::no_equal(
                "write the whole ARN: --assume-role-arn=arn:aws:iam::ACCOUNT:role/NAME",
            ),
            "disable-strict-namespace-regexp" => Verdict::no_equal(
                "expressions must match the whole ARN: change the annotations of the namespaces below",
            ),
            "iam-role-key" => key(value, ROLE),
            "namespace-key" => key(value, ALLOWED_ROLES),
            "iam-external-id" => key(value, EXTERNAL_ID),
            "iam-role-session-name-key" => key(value, SESSION_NAME),
            "namespace-restrictions" => {
                self.settings.set("namespace-policy", "required");
                Verdict::renamed("--namespace-policy=required")
            }
            "namespace-restriction-format" if !value.eq_ignore_ascii_case("regexp") => {
                Verdict::unneeded("the agent reads globs")
            }
            _ => return None,
        })
    }

    /// Flags about sessions and their tags.
    fn sessions(&mut self, setting: &Setting) -> Option<Verdict> {
        let value = setting.value.as_str();
        Some(match setting.name.as_str() {
            "session" => self.session(value),
            "iam-role-session-ttl" => self.session_ttl(value),
            "iam-enable-pod-identity-tags" => {
                for tag in POD_IDENTITY_TAGS {
                    self.settings.add("session-tags", tag);
                }
                Verdict::renamed(format!("--session-tags={}", POD_IDENTITY_TAGS.join(",")))
            }
            "eks-cluster-name" | "eks-cluster-arn"
                if !self.installation.has("iam-enable-pod-identity-tags") =>
            {
                Verdict::unneeded("without --iam-enable-pod-identity-tags it does nothing")
            }
            "eks-cluster-arn" => {
                self.settings.add("session-tags", &format!("eks-cluster-arn={value}"));
                Verdict::renamed(format!("--session-tags=eks-cluster-arn={value}"))
            }
            _ => return None,
        })
    }

    /// The port was that of the iptables rule. The kernel knows this agent's, whatever it is, so that it need only be free
    /// while both agents run on a node.
    fn port(&mut self, value: &str) -> Verdict {
        if value == PORT {
            self.settings.set("port", OTHER_PORT);
            return Verdict::renamed(format!(
                "--port={OTHER_PORT}, since both agents run on a node during the change"
            ));
        }
        Verdict::unneeded(format!(
            "pods get to the agent by the kernel; its own port, {PORT}, is free beside the old agent's"
        ))
    }

    fn level(&mut self, level: &str) -> Verdict {
        self.settings.set("level", level);
        Verdict::renamed(format!("--level={level}"))
    }

    /// kube2iam's levels, which are logrus's. `--verbose` counts before them.
    fn log_level(&mut self, value: &str) -> Verdict {
        if self.installation.has("verbose") {
            return Verdict::unneeded("--verbose counts");
        }
        match value.to_ascii_lowercase().as_str() {
            "panic" | "fatal" => self.level("error"),
            "warning" => self.level("warn"),
            // At the agent's own `trace` the kernel programs log as well.
            "trace" => self.level("debug"),
            level => self.level(level),
        }
    }

    fn statsd(&mut self, part: &Part, value: &str) -> Verdict {
        let Some((host, port)) = value.rsplit_once(':') else {
            return Verdict::no_equal(format!(
                "--statsd takes an address with a port, not {value:?}"
            ));
        };
        let host = if host == "localhost" { "127.0.0.1" } else { host };
        if host != HOST_IP && address(host).is_none() {
            return Verdict::no_equal(format!(
                "--statsd takes an IP address, not the name {host:?}: give the one of a server on the node, such as \
                 {HOST_IP}:{port}"
            ));
        }
        let address = format!("{host}:{port}");
        let verdict = match address == value {
            true => Verdict::kept(),
            false => Verdict::kept_as(format!("--statsd={address}")),
        };
        self.set(part, "statsd", &address, verdict)
    }

    /// The listener of metrics, at the node's address where it was at all addresses. kube2iam's flags are two.
    fn metrics(&mut self, part: &Part, name: &str, value: &str) -> Verdict {
        if self.manner.observes {
            return Verdict::unneeded(
                "while the old agent has the port: add it when the old agent is gone",
            );
        }
        let (host, port) = match name {
            "prometheus-listen-addr" => value.rsplit_once(':').unwrap_or((value, "")),
            "metrics-port" => {
                (self.installation.value("metrics-bind-ip").unwrap_or_default(), value)
            }
            _ => {
                let port = self.installation.value("metrics-port").unwrap_or(KUBE2IAM_PORT);
                (value, port)
            }
        };
        let host = match host {
            "" | "0.0.0.0" | "[::]" | "::" => HOST_IP,
            "localhost" => "127.0.0.1",
            other => other,
        };
        if host != HOST_IP && address(host).is_none() {
            return Verdict::no_equal(format!("--metrics takes an IP address, not {host:?}"));
        }
        let address = format!("{host}:{port}");
        self.set(part, "metrics", &address, Verdict::renamed(format!("--metrics={address}")))
    }

    fn paths(&mut self, value: &str) -> Verdict {
        let flags = |paths: &[String]| -> String {
            let flags: Vec<String> =
                paths.iter().map(|path| format!("--allow-path={path}")).collect();
            flags.join(" ")
        };
        match routes(value) {
            Routes::Nothing => Verdict::unneeded("it opens nothing"),
            Routes::Paths(paths) => {
                for path in &paths {
                    self.settings.add("allow-path", path);
                }
                Verdict::renamed(flags(&paths))
            }
            Routes::Wider { paths, wider } => {
                for path in &paths {
                    self.settings.add("allow-path", path);
                }
                Verdict::no_equal(format!(
                    "{} would open more than the expression, since a * stands for everything below: add it if pods \
                     may read all of that",
                    flags(&wider)
                ))
            }
            Routes::Broad => {
                self.settings.add("allow-path", "common");
                Verdict::no_equal(
                    "--allow-path=common opens what most programs ask for; it takes paths and no expressions, and \
                     some paths stay shut (docs/paths.md): see with --mode=observe which pods ask for more",
                )
            }
        }
    }

    /// kube2iam adds the slash.
    fn base(&mut self, value: &str) -> Verdict {
        let base = format!("{}/", value.trim_end_matches('/'));
        self.settings.set("role-base-arn", &base);
        let added = if base == value { "" } else { ", with the slash that kube2iam adds" };
        Verdict::renamed(format!("--role-base-arn={base}{added}"))
    }

    /// kiam puts `kiam-` before it; the agent's own value is kiam's.
    fn session(&mut self, value: &str) -> Verdict {
        let name = format!("kiam-{value}");
        if value == "kiam" {
            return Verdict::unneeded(format!("--session-name={name} is the agent's own value"));
        }
        self.settings.set("session-name", &name);
        Verdict::renamed(format!("--session-name={name}, which kiam made of it"))
    }

    fn session_ttl(&mut self, value: &str) -> Verdict {
        let Ok(ttl) = humantime::parse_duration(value) else {
            return Verdict::no_equal(format!("{value:?} is not a duration, such as 15m"));
        };
        let duration = ttl.saturating_mul(2).clamp(SHORTEST, LONGEST);
        let duration = humantime::format_duration(duration).to_string().replace(' ', "");
        self.settings.set("session-duration", &duration);
        Verdict::renamed(format!(
            "--session-duration={duration}: kube2iam asks STS for twice its value"
        ))
    }
}

/// The IP address that `host` is, in brackets or not.
fn address(host: &str) -> Option<IpAddr> {
    host.trim_matches(['[', ']']).parse().ok()
}

/// A flag that names an annotation.
fn key(value: &str, ours: &str) -> Verdict {
    if value == ours {
        return Verdict::unneeded("it is the annotation that the agent reads");
    }
    Verdict::no_equal(format!("the agent reads {ours}: write it beside {value} before the change"))
}
