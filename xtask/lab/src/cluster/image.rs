//! The images: the agent's, with this build's program, and that of the pods which ask.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use lab::runtime::{busybox, write_busybox, write_image};
use serde_json::json;

use xtask::{
    command::{command, output_of, run, workspace},
    oci::Root,
};

/// What STS's certificate is checked against.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// As `deploy/` names it.
const AGENT: &str = "docker.io/library/kiam-agent:0.1.0";
const CLIENT: &str = "lab.invalid/client:1";

/// Writes them as `*.tar` into `to`. The agent's program is `agent`, and is not static as a release's is. Busybox is that of the
/// node's `disk`.
pub(super) fn write(agent: &Path, disk: &Path, to: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let program = to.join("busybox");
    let dump = format!("dump -p /usr/bin/busybox {}", program.display());
    run(command("debugfs").args(["-R", &dump]).arg(disk))?;
    let mut root = Root::default();
    root.file("usr/local/bin/kiam-agent", 0o755, read(agent)?);
    for file in libraries(agent)?.iter().map(String::as_str).chain([CERTIFICATES]) {
        root.file(file.trim_start_matches('/'), 0o755, read(Path::new(file))?);
    }
    let config = json!({
        "Entrypoint": ["kiam-agent"],
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
    });
    write_image(&root, AGENT, config, &to.join("agent.tar"))?;
    let mut root = busybox(&program)?;
    root.file("bin/ask", 0o755, read(&workspace().join("xtask/cluster/ask"))?);
    write_image(&root, CLIENT, json!({ "Env": ["PATH=/bin"] }), &to.join("client.tar"))?;
    // For the sandboxes.
    write_busybox(&program, &to.join("sandbox.tar"))?;
    fs::remove_file(program).context("removing what the images were made of")
}

/// The files that a program is linked with.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let said = output_of(command("ldd").arg(program)).context("asking ldd for libraries")?;
    let paths = said.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(ToOwned::to_owned).collect())
}
