//! systemd-networkd, which removes the routing rules of others while it sets links up.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use tokio::time::Instant;

use super::{
    client::AskingPod,
    stage::{Stage, guard_rules, output, wait},
};

/// Routing rules of the guard, of both families.
const RULES: usize = 12;
/// The default, said aloud. Nodes of clouds say `no`.
const CONFIG: &str = "[Network]\nManageForeignRoutingPolicyRules=yes\n";
const CONFIG_FOLDER: &str = "/run/systemd/networkd.conf.d";
const ADDRESSES: [&str; 2] = ["169.254.169.254", "fd00:ec2::254"];

/// `ip monitor`, which writes down each change of rules and routes.
struct Monitor {
    process: Child,
    lines: PathBuf,
}

/// How often the guard's rules came and went, and routes did.
#[derive(Debug, Default)]
struct Changes {
    removed: usize,
    restored: usize,
    routes: usize,
}

// === impl Monitor ===

impl Monitor {
    fn start(stage: &Stage) -> Result<Self> {
        let lines = stage.lab.node.folder().join("monitor");
        let file = File::create(&lines).context("making a file for ip monitor")?;
        let mut command = Command::new("ip");
        command.args(["-N", "monitor", "rule", "route"]).stdin(Stdio::null()).stdout(file);
        let monitor = Self { process: command.spawn().context("starting ip monitor")?, lines };
        // It has begun to listen once it sees a route come and go.
        let probe = ["route", "add", "192.0.2.77/32", "dev", "lo"];
        wait("ip monitor", || {
            let _ = output("ip", &probe);
            let _ = output("ip", &["route", "del", "192.0.2.77/32", "dev", "lo"]);
            let seen = fs::read_to_string(&monitor.lines).is_ok_and(|it| it.contains("192.0.2.77"));
            (!seen).then(|| "it sees nothing".to_owned())
        })?;
        Ok(monitor)
    }

    fn changes(&self) -> Result<Changes> {
        let lines = fs::read_to_string(&self.lines).context("reading what ip monitor saw")?;
        let mut changes = Changes::default();
        for line in lines.lines().filter(|line| !line.contains("192.0.2.77")) {
            let of_guard = ADDRESSES.iter().any(|address| line.contains(address))
                && line.contains("proto 107");
            match (of_guard, line.starts_with("Deleted ")) {
                (true, true) => changes.removed += 1,
                (true, false) => changes.restored += 1,
                (false, _) => changes.routes += 1,
            }
        }
        Ok(changes)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(super) fn restart(stage: &mut Stage) -> Result<String> {
    wait("the guard's rules", rules_missing)?;
    fs::create_dir_all(CONFIG_FOLDER).context("making a folder for networkd")?;
    fs::write(format!("{CONFIG_FOLDER}/lab.conf"), CONFIG).context("configuring networkd")?;
    let client = AskingPod::start(stage)?;
    let monitor = Monitor::start(stage)?;
    output("systemctl", &["restart", "systemd-networkd"])?;
    output("networkctl", &["reconfigure", "node0"])?;
    let begun = Instant::now();
    wait("networkd, which removes rules of others", || match monitor.changes() {
        Ok(changes) if changes.removed > 0 => None,
        other => Some(format!("it removed none: {other:?}")),
    })?;
    wait("the guard's rules", rules_missing)?;
    let back = begun.elapsed();
    client.go_on(stage)?;
    // It may take them away a little later too.
    wait("the guard's rules", rules_missing)?;
    let served = client.finish_served(stage)?;
    let Changes { removed, restored, routes } = monitor.changes()?;
    ensure!(restored >= removed, "{restored} of {removed} rules came back");
    Ok(format!(
        "0 of {served} requests failed; networkd removed {removed} rules and changed {routes} routes; all {RULES} rules there {:.1} s later",
        back.as_secs_f64()
    ))
}

fn rules_missing() -> Option<String> {
    match guard_rules() {
        Ok(rules) if rules.len() == RULES => None,
        other => Some(format!("not {RULES} rules but {other:?}")),
    }
}
