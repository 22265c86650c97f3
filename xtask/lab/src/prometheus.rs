//! A real Prometheus on the lab's node, which scrapes the agent and evaluates rules.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use form_urlencoded::Serializer;
use serde_json::{Value, json};

use super::{Lab, Node, Process, agent::ADMIN};
use crate::pod_client::wire::exchange;

const API: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 9090);
const START_LIMIT: Duration = Duration::from_secs(60);
/// What the server waits for between two scrapes, and two evaluations.
pub const INTERVAL: &str = "1s";

/// One run of the server, with no samples at first.
#[derive(Debug)]
pub struct Prometheus {
    process: Process,
    node: Node,
    // Removed last.
    folder: tempfile::TempDir,
}

/// Debian's package, as `cargo xtask test node` unpacks it, or `None` after a line that says what is missing.
///
/// # Panics
///
/// When it is missing and [`super::NO_SKIP`] is set.
#[must_use]
pub fn package(test: &str) -> Option<xtask::prometheus::Prometheus> {
    let package = xtask::prometheus::Prometheus::unpacked();
    if package.is_none() {
        let reason = "needs Prometheus, which `cargo xtask test node` unpacks on Debian";
        let strict = std::env::var_os(super::NO_SKIP).is_some();
        assert!(!strict, "{test} can't run, and {} is set: {reason}", super::NO_SKIP);
        eprintln!("skipped: {test}: {reason}");
    }
    package
}

// === impl Prometheus ===

impl Prometheus {
    /// Starts the server beside the agent of `lab`; `rules` is the content of a rules file.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(
        package: &xtask::prometheus::Prometheus,
        lab: &Lab,
        rules: &Value,
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder for Prometheus")?;
        let file = |name: &str, content: &Value| -> Result<_> {
            let path = folder.path().join(name);
            // JSON is YAML.
            fs::write(&path, content.to_string())
                .with_context(|| format!("writing {}", path.display()))?;
            Ok(path)
        };
        file("rules.yaml", rules)?;
        let (host, port) = ADMIN;
        let config = json!({
            "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{
                "job_name": "kiam-agent", "static_configs": [{"targets": [format!("{host}:{port}")]}],
            }],
        });
        let config = file("prometheus.yaml", &config)?;
        let mut server = lab.node.command(package.program("prometheus"))?;
        server.env_clear().arg("--config.file").arg(config);
        server.arg("--storage.tsdb.path").arg(folder.path().join("data"));
        server.arg("--web.listen-address").arg(SocketAddr::from(API).to_string());
        let log = folder.path().join("log");
        let process = Process::start("Prometheus", &mut server, log)?;
        let mut prometheus = Self { process, node: lab.node.clone(), folder };
        let node = prometheus.node.clone();
        prometheus.process.wait("become ready", START_LIMIT, |_| {
            get(&node, "/-/ready").is_ok_and(|(status, _)| status == 200)
        })?;
        Ok(prometheus)
    }

    /// The result of an instant query, as the API has it; an error where the expression is one.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        self.ask("query", &[("query", expression)], "result")
    }

    /// The result of a query for the last `seconds`, with a sample each second.
    pub fn query_range(&self, expression: &str, now: f64, seconds: u32) -> Result<Vec<Value>> {
        let (start, end) = ((now - f64::from(seconds)).to_string(), now.to_string());
        let fields = [("query", expression), ("start", &start), ("end", &end), ("step", INTERVAL)];
        self.ask("query_range", &fields, "result")
    }

    /// The names of the alerts that fire now.
    pub fn firing(&self) -> Result<BTreeSet<String>> {
        let alerts = self.ask("alerts", &[], "alerts")?;
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        Ok(firing
            .filter_map(|alert| alert["labels"]["alertname"].as_str().map(str::to_owned))
            .collect())
    }

    /// The alerts as the API shows them, with their labels and annotations.
    pub fn alerts(&self) -> Result<Vec<Value>> {
        self.ask("alerts", &[], "alerts")
    }

    fn ask(&self, what: &str, fields: &[(&str, &str)], list: &str) -> Result<Vec<Value>> {
        let query = Serializer::new(String::new()).extend_pairs(fields).finish();
        let (status, body) = get(&self.node, &format!("/api/v1/{what}?{query}"))?;
        let answer: Value = serde_json::from_str(&body)
            .with_context(|| format!("Prometheus answered {status}: {body}"))?;
        if answer["status"] != "success" {
            bail!("{what} {fields:?}: {}", answer["error"]);
        }
        let list = answer["data"][list].as_array();
        Ok(list.with_context(|| format!("no list in {body}"))?.clone())
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }
}

fn get(node: &Node, path: &str) -> Result<(u16, String)> {
    let stream = node.netns().enter(|| TcpStream::connect(SocketAddr::from(API)))?;
    let mut stream = stream.context("connecting to Prometheus")?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).context("setting a timeout")?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let reply = exchange(&mut stream, &request).with_context(|| format!("asking for {path}"))?;
    Ok((reply.status, reply.body))
}
