//! Load by wrk, and what a server does under it.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::Process;
use serde::Deserialize;
use xtask::command::printed;

/// Connections at once, as of a busy pod, by this many threads of wrk.
const CONNECTIONS: u32 = 32;
const THREADS: u32 = 2;

/// Printed by wrk at its end, as JSON.
const SCRIPT: &str = r#"
done = function(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        '{"requests":%d,"micros":%d,"p50":%d,"p99":%d,"failed":%d}\n',
        summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"#;

/// What is requested.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) url: String,
    pub(super) headers: Vec<String>,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded {
    pub(super) per_second: f64,
    /// Of the server, for each request.
    pub(super) cpu_micros: f64,
    pub(super) p99_millis: f64,
}

#[derive(Debug, Deserialize)]
struct Summary {
    requests: u64,
    micros: u64,
    p99: u64,
    failed: u64,
}

/// Writes wrk's script into `folder`.
pub(super) fn script(folder: &Path) -> Result<std::path::PathBuf> {
    let path = folder.join("report.lua");
    std::fs::write(&path, SCRIPT).context("writing wrk's script")?;
    Ok(path)
}

/// Runs `wrk`, a command of this name in the place of the client, against `server`.
pub(super) fn load(
    mut wrk: Command,
    script: &Path,
    request: &Request,
    time: Duration,
    server: &Process,
) -> Result<Loaded> {
    wrk.args([
        format!("-t{THREADS}"),
        format!("-c{CONNECTIONS}"),
        format!("-d{}s", time.as_secs()),
    ]);
    wrk.arg("-s").arg(script).arg(&request.url);
    for header in &request.headers {
        wrk.arg("-H").arg(header);
    }
    let before = server.cpu_time()?;
    let text = printed(&mut wrk)?;
    let cpu = server.cpu_time()?.saturating_sub(before);
    let line = text.lines().find(|line| line.starts_with('{')).context("wrk reports at its end")?;
    let summary: Summary = serde_json::from_str(line).context("what wrk reports")?;
    ensure!(summary.failed == 0 && summary.requests > 0, "requests failed: {summary:?}");
    let requests = summary.requests as f64;
    Ok(Loaded {
        per_second: requests / (summary.micros as f64 / 1e6),
        cpu_micros: cpu.as_secs_f64() * 1e6 / requests,
        p99_millis: summary.p99 as f64 / 1e3,
    })
}
