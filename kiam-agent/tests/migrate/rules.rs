//! The commands that remove the old agents' rules, with the real iptables in a network namespace of its own.

use std::process::Command;

use super::printed;

/// The rule as kiam and kube2iam append it (`cmd/kiam/iptables.go`, `iptables/iptables.go`), for a node at 10.0.0.5.
fn appended(port: &str, interface: &str) -> String {
    let (inverted, name) = match interface.strip_prefix('!') {
        Some(name) => ("! ", name),
        None => ("", interface),
    };
    format!(
        "iptables -t nat -A PREROUTING -p tcp -d 169.254.169.254 --dport 80 -j DNAT --to-destination 10.0.0.5:{port} {inverted}-i {name}"
    )
}

/// The command of the report that removes the rule.
fn command(file: &str) -> String {
    let (text, _) = printed(&[file, "--output=flags"]);
    let line = text.lines().find(|line| line.contains("iptables -t nat -D")).expect(file);
    line.trim_start_matches(['#', ' ']).to_owned()
}

/// What `script` prints in a network namespace of its own.
fn isolated(script: &str) -> Result<String, String> {
    let mut shell = Command::new("unshare");
    let output = shell.args(["--net", "sh", "-ec", script]).output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn the_command_removes_the_rule_that_the_old_agent_appends() {
    // iptables needs root and the kernel's nat table.
    if let Err(reason) = isolated("iptables -t nat -S PREROUTING") {
        assert!(std::env::var_os(lab::NO_SKIP).is_none(), "iptables: {reason}");
        eprintln!("skipped: the_command_removes_the_rule_that_the_old_agent_appends: {reason}");
        return;
    }
    for (file, port, interface) in [
        ("kiam/v1.yaml", "8181", "cali+"),
        ("kiam/v2.yaml", "3100", "weave"),
        ("kiam/v3-eks.yaml", "8181", "!eth0"),
        ("kiam/v3-helm.yaml", "8181", "eni+"),
        ("kiam/v3-shell.yaml", "3100", "docker0"),
        ("kube2iam/plain.yaml", "8181", "docker0"),
        ("kube2iam/list.yaml", "8181", "tun0"),
        ("kube2iam/expressions.json", "8181", "cni0"),
        ("kube2iam/command.yaml", "8282", "!eth0"),
    ] {
        let (rule, remove) = (appended(port, interface), command(file));
        let other = appended("1", "other0");
        let script =
            format!("HOST_IP=10.0.0.5\n{rule}\n{other}\n{remove}\niptables -t nat -S PREROUTING");
        let left = isolated(&script).unwrap_or_else(|error| panic!("{file}: {script}: {error}"));
        assert!(left.contains("other0"), "{file}: {left}");
        assert!(!left.contains(&format!(":{port}\n")), "{file}: {left}");
    }
}
