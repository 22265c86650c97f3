//! The boot guard: the node sets the rules before any agent runs, the agent adopts them, and an uninstallation leaves nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use lab::{Lab, LabPod, PodSpec, eventually};

use super::{AGENT, assert_shut, expected_rules, host_gets_the_instance_id, packets, rules};

/// What the agent prints of the boot guard's texts.
fn printed(what: &str, further: &[&str]) -> String {
    let output = Command::new(AGENT).args(["boot-guard", what]).args(further).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the script as the unit does.
fn boot(lab: &Lab, script: &Path) -> Output {
    lab.node.command("/bin/sh").unwrap().arg(script).env_clear().output().unwrap()
}

/// A folder that outlives a boot, as the node's own does.
fn units() -> tempfile::TempDir {
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
    let folder = units();
    let script = folder.path().join("kiam-boot-guard.sh");
    fs::write(&script, printed("script", &[])).unwrap();
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    // What the boot guard is for.
    assert!(asks(&pod).starts_with("answered: "), "without it the pod gets the node's");
    assert!(packets(&lab, &pod) > 0);
    let early = lab.pod(PodSpec::new("shop", "bills").role("bills")).unwrap();

    // The second time as when the kubelet's start is what starts it again.
    for _ in 0..2 {
        let output = boot(&lab, &script);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(rules(lab.node.netns()), expected_rules(5));
    }
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
    eventually("the agent writes the files", || {
        agent.admin("/ready").is_ok_and(|ready| ready.body.contains("boot guard: installed"))
    });
    // What the agent wrote is what it prints, in the place of what was there.
    assert_eq!(fs::read_to_string(&script).unwrap(), printed("script", &[]));
    let unit_file = folder.path().join("kiam-boot-guard.service");
    assert_eq!(fs::read_to_string(&unit_file).unwrap(), printed("unit", &[]));
    let metrics = agent.admin("/metrics").unwrap().body;
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
    let metrics = agent.admin("/metrics").unwrap().body;
    assert!(metrics.contains("kiam_guard_boot{state=\"failed\"} 1\n"), "{metrics}");
}

#[test]
fn systemd_takes_the_unit() {
    let folder = units();
    let installed = Command::new("systemd-analyze").arg("--version").output();
    if !installed.is_ok_and(|output| output.status.success()) {
        return println!("systemd_takes_the_unit: skipped, no systemd-analyze");
    }
    // systemd looks whether what the unit runs is there; the shell is.
    let unit = folder.path().join("kiam-boot-guard.service");
    fs::write(&unit, printed("unit", &[])).unwrap();
    let output =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("kiam-boot-guard")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}
