//! The boot guard: the node sets the rules before any agent runs, the agent adopts them, and an uninstallation leaves nothing.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::Duration,
};

use kiam_agent::admin;
use lab::{Lab, LabPod, PodSpec, eventually, pod_client::wire::exchange};
use serde_json::Value;

use super::{AGENT, assert_shut, expected_rules, host_gets_the_instance_id, packets, rules};

/// Start times are told in hundredths of a second.
const TICKS: Duration = Duration::from_millis(50);

/// What the agent prints of the boot guard's texts.
fn printed(what: &str, further: &[&str]) -> String {
    let output = Command::new(AGENT).args(["boot-guard", what]).args(further).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the script as the unit does, but for where it notes when.
fn boot(lab: &Lab) -> Output {
    let script = lab.node.folder().join("boot-guard.sh");
    let state = lab.state().display().to_string();
    fs::write(&script, printed("script", &[]).replace("/run/kiam", &state)).unwrap();
    lab.node.command("/bin/sh").unwrap().arg(script).env_clear().output().unwrap()
}

/// The pods of which `/pods` says that they may hold the node's credentials.
fn exposed(lab: &Lab) -> Vec<String> {
    let Ok(mut operator) = UnixStream::connect(lab.state().join(admin::SOCKET)) else {
        return Vec::new();
    };
    let request = "GET /pods HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let Ok(reply) = exchange(&mut operator, request) else { return Vec::new() };
    let pods: Value = serde_json::from_str(&reply.body).unwrap();
    let exposed = pods.as_array().unwrap().iter();
    let exposed = exposed.filter(|pod| !pod["mayHoldNodeCredentialsUntil"].is_null());
    exposed.map(|pod| pod["name"].as_str().unwrap().to_owned()).collect()
}

/// A folder that outlives a boot, as the node's own does.
fn units() -> tempfile::TempDir {
    // Where the test was compiled elsewhere, as for another kernel, cargo has made no such folder.
    fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The names of all that is below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found
}

fn asks(pod: &LabPod) -> String {
    let attempt = pod.credentials().unwrap();
    attempt.error.unwrap_or_else(|| format!("answered: {}", attempt.body))
}

#[test]
fn at_boot_no_pod_reaches_the_imds_before_the_agent_and_the_agent_adopts_the_rules() {
    let Some(lab) = lab::node_test!() else { return };
    if lab::no_disk(Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        return;
    }
    let folder = units();
    let script = folder.path().join("kiam-boot-guard.sh");
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    // What the boot guard is for.
    assert!(asks(&pod).starts_with("answered: "), "without it the pod gets the node's");
    assert!(packets(&lab, &pod) > 0);
    // The second time as when the kubelet's start is what starts it again.
    for _ in 0..2 {
        let output = boot(&lab);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(rules(lab.node.netns()), expected_rules(5));
    }
    thread::sleep(TICKS);
    let early = lab.pod(PodSpec::new("shop", "bills").role("bills")).unwrap();
    // The last packets of what the first pod asked came while the script ran.
    let before = packets(&lab, &pod);
    for pod in [&early, &pod] {
        assert_eq!(asks(pod), "EHOSTUNREACH");
    }
    assert_shut(&lab, &early, "before any agent has started");
    host_gets_the_instance_id(&lab);

    let unit = format!("--boot-guard={}", folder.path().display());
    let mut agent = lab.agent(&[&unit]);
    assert!(agent.said("The route guard is on preference=5 added=0 removed=0"), "{}", agent.log());
    assert_eq!(rules(lab.node.netns()), expected_rules(5));
    for (pod, role) in [(&early, "bills"), (&pod, "orders")] {
        lab.assert_served(pod, role);
    }
    assert_eq!(packets(&lab, &early), 0);
    assert_eq!(packets(&lab, &pod), before);
    eventually("the pod from before the script", || exposed(&lab) == ["orders"]);
    eventually("the agent writes the files", || {
        agent.admin("/ready").is_ok_and(|ready| ready.body.contains("boot guard: installed"))
    });
    // What the agent wrote is what it prints, in the place of what was there.
    assert_eq!(fs::read_to_string(&script).unwrap(), printed("script", &[]));
    let unit_file = folder.path().join("kiam-boot-guard.service");
    assert_eq!(fs::read_to_string(&unit_file).unwrap(), printed("unit", &[]));
    let metrics = agent.metrics();
    assert!(metrics.contains("kiam_guard_boot{state=\"installed\"} 1\n"), "{metrics}");

    agent.kill().unwrap();
    let said = lab.uninstall_with(&[&unit]).unwrap();
    assert!(said.contains("removed") && said.contains("kiam-boot-guard.service"), "{said}");
    assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
    assert_eq!(rules(lab.node.netns()), Vec::<String>::new());
    assert!(!lab.state().exists() && !lab.pins().exists(), "{said}");
    let again = lab.uninstall_with(&[&unit]).unwrap();
    assert!(again.contains("nothing is installed"), "{again}");
}

#[test]
fn rules_that_went_before_the_agent_came_count_for_nothing() {
    let Some(lab) = lab::node_test!() else { return };
    assert!(boot(&lab).status.success());
    thread::sleep(TICKS);
    let _pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let rule = ["-4", "rule", "del", "pref", "8"];
    assert!(lab.node.command("ip").unwrap().args(rule).status().unwrap().success());
    thread::sleep(TICKS);
    let mut first = lab.agent(&[]);
    eventually("the pod", || exposed(&lab) == ["orders"]);
    assert!(first.said("1 of its routing rules are gone"), "{}", first.log());
    // The agent has restored the rules, which proves nothing to the next one.
    first.kill().unwrap();
    assert_eq!(rules(lab.node.netns()), expected_rules(5));
    let _second = lab.agent(&[]);
    eventually("the pod", || exposed(&lab) == ["orders"]);
}

#[test]
fn an_agent_that_comes_later_knows_what_the_boot_guard_covered() {
    let Some(lab) = lab::node_test!() else { return };
    assert!(boot(&lab).status.success());
    thread::sleep(TICKS);
    let _pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let _host = lab.pod(PodSpec::new("shop", "host").host_network()).unwrap();
    thread::sleep(TICKS);
    let flags = ["--host-network-pods=intercept"];
    let mut first = lab.agent(&flags);
    eventually("the one on the node's network", || exposed(&lab) == ["host"]);
    assert!(!lab.state().join("boot-guard").exists(), "the note counts once");
    first.kill().unwrap();
    let _second = lab.agent(&flags);
    eventually("the same", || exposed(&lab) == ["host"]);
}

#[test]
fn a_boot_guard_that_can_not_be_written_shows_and_the_agent_serves() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&["--boot-guard=/proc/sys"]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    lab.assert_served(&pod, "orders");
    eventually("the failure shows", || {
        agent.said("The boot guard is not installed")
            && agent.admin("/ready").is_ok_and(|ready| {
                ready.status == 200 && ready.body.contains("boot guard: failed: ")
            })
    });
    let metrics = agent.metrics();
    assert!(metrics.contains("kiam_guard_boot{state=\"failed\"} 1\n"), "{metrics}");
}

#[test]
fn systemd_takes_the_unit() {
    if lab::no_program("systemd-analyze") {
        return;
    }
    let folder = units();
    // systemd looks whether what the unit runs is there; the shell is.
    let unit = folder.path().join("kiam-boot-guard.service");
    fs::write(&unit, printed("unit", &[])).unwrap();
    let output =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("kiam-boot-guard")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}
