//! `kubectl kiam`, beside the control plane, where an operator's machine would be.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::NODE_NAME;
use serde_json::Value;

use super::{pods::NAMESPACE, rows::kind, stage::Stage};

/// The plugin, by the real server's and kubelet's exec, as the administrator.
pub(super) fn from_the_laptop(stage: &mut Stage) -> Result<String> {
    kind(stage, "sidecar", &["main"])?;
    let pod = format!("{NAMESPACE}/{}", stage.pod("sidecar")?);
    let plugin = std::env::current_exe().context("finding this program")?;
    let plugin = plugin.with_file_name("kubectl-kiam");
    let ask = |words: &[&str]| -> Result<(bool, Value)> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=1", "120"]).arg(&plugin).args(words).arg("--output=json");
        command.env_clear().env("KUBECONFIG", &stage.kubectl.config);
        let output = command.output().context("starting kubectl-kiam")?;
        let value = serde_json::from_slice(&output.stdout).with_context(|| {
            format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr))
        });
        Ok((output.status.success(), value?))
    };
    let (ready, status) = ask(&["status"])?;
    let node = &status["nodes"][0];
    ensure!(ready && node["node"] == NODE_NAME, "{status:#}");
    for (name, expected) in [("selfTest", "passed"), ("interception", "enforce")] {
        ensure!(node["status"][name] == expected, "{status:#}");
    }
    let (served, explained) = ask(&["explain", &pod])?;
    let role = &explained["explanation"]["pods"][0]["role"];
    ensure!(served && *role == lab::role_arn("sidecar"), "{explained:#}");
    let (_, pods) = ask(&["pods"])?;
    let count = pods["pods"].as_array().map_or(0, Vec::len);
    ensure!(count > 0, "{pods:#}");
    let (issued, refreshed) = ask(&["refresh", &pod])?;
    ensure!(issued, "{refreshed:#}");
    let (_, checked) = ask(&["check"])?;
    let verdict = checked["nodes"][0]["preflight"]["verdict"].as_str();
    let verdict = verdict.with_context(|| format!("{checked:#}"))?;
    Ok(format!("status, explain, pods ({count}), refresh; check says {verdict}"))
}
