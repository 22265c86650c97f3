//! A pod that floods, a full disk, files that can't be written, and a log that nobody reads.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
};

use lab::{Agent, READY_LIMIT, pod_client::Options};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::{counted, line_of, lines, of_pod, text};

const DROPPED: [&str; 3] = ["Share", "Queue", "Write"];

fn dropped(agent: &Agent, reason: &str) -> u64 {
    agent.metric(&format!("kiam_audit_dropped_total{{reason=\"{reason}\"}}"))
}

/// A file system that holds `size` bytes, until this is dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(path: &'a Path, size: &str) -> Self {
        fs::create_dir(path).unwrap();
        let disk = Self(path);
        disk.mount_by(&format!("mode=0700,size={size}"));
        disk
    }

    fn mount_by(&self, options: &str) {
        let mut mount = Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", options, "audit"]).arg(self.0).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

#[test]
fn a_pod_that_floods_is_counted_and_takes_no_line_of_another() {
    let Some(lab) = lab::node_test!() else { return };
    let file = lab.node.folder().join("audit/audit.log");
    let flag = format!("--audit-file={}", file.display());
    let mut agent = lab.agent(&["--audit=file", &flag]);
    let (flooder, other) = (super::served(&lab, "orders"), lab.pod_of("reports"));
    let served = counted(&lines(&text(&file)), &flooder);
    let flood = Options { repeat: 500, ..Options::default() };
    let flooded = flooder.ask(&flood).unwrap();
    let answered = flooded.iter().filter(|attempt| attempt.status == Some(200)).count();
    assert!(answered > 200, "{answered}");
    lab.assert_served(&other, "reports");
    line_of(|| text(&file), &other);
    let first = of_pod(&lines(&text(&file)), &flooder).len();
    assert!(first < 150, "{first} lines of one process in seconds");
    let share = dropped(&agent, "Share");
    agent.terminate().unwrap();
    let all = lines(&text(&file));
    let seen = counted(&all, &flooder) - served.min(1) + share;
    assert!(seen.abs_diff(answered as u64) <= 1, "{seen} of {answered} are accounted for");
    assert!(counted(&all, &other) >= 1);
}

#[test]
fn a_full_disk_costs_lines_and_no_answer() {
    let Some(lab) = lab::node_test!() else { return };
    let folder = lab.node.folder().join("disk");
    let disk = SmallDisk::mount(&folder, "16k");
    let file = folder.join("audit.log");
    let flag = format!("--audit-file={}", file.display());
    let agent = lab.agent(&["--audit=file", &flag]);
    let pod = super::served(&lab, "orders");
    for attempt in pod.ask(&Options { repeat: 40, ..Options::default() }).unwrap() {
        assert_eq!(attempt.status, Some(200), "{attempt:?}");
    }
    lab::eventually("lines are dropped", || dropped(&agent, "Write") > 0);
    assert!(agent.said("Writing the audit failed"));
    // The file has whole lines only.
    let whole = text(&file);
    assert!(whole.ends_with("}\n") && lines(&whole).len() == whole.lines().count(), "{whole}");
    disk.mount_by("remount,size=1m");
    let other = lab.pod_of("reports");
    lab.assert_served(&other, "reports");
    line_of(|| text(&file), &other);
    drop(agent);
}

#[test]
fn a_file_that_others_may_replace_is_not_written_and_pods_are_served() {
    let Some(lab) = lab::node_test!() else { return };
    let folder = lab.node.folder().join("open");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let file = folder.join("audit.log");
    let flag = format!("--audit-file={}", file.display());
    let agent = lab.agent(&["--audit=file", &flag]);
    let pod = super::served(&lab, "orders");
    lab::eventually("its lines are dropped", || dropped(&agent, "Write") > 0);
    assert!(!file.exists());
    assert!(agent.said("other users may write to the file's folder"), "{}", agent.log());
    // Once it is mended, lines are written.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    lab.assert_served(&pod, "orders");
    line_of(|| text(&file), &pod);
}

#[test]
fn a_log_that_nobody_reads_delays_no_answer() {
    let Some(lab) = lab::node_test!() else { return };
    let pipe = lab.node.folder().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Open for reading, so that the agent can open it, and never read.
    let _reader: File = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let mut command = lab.node.command("bash").unwrap();
    let script = format!("exec \"$@\" 2>{}", pipe.display());
    command.args(["-c", &script, "bash"]).arg(lab::agent_binary().unwrap());
    // Its own log would wait for the reader, too.
    let mut agent = Agent::start_by(command, &lab, &["--level=error"]).unwrap();
    agent.wait_ready(READY_LIMIT).unwrap();
    let pods: Vec<_> = (0..6).map(|n| lab.pod_of(&format!("role-{n}"))).collect();
    for pod in &pods {
        for attempt in pod.ask(&Options { repeat: 40, ..Options::default() }).unwrap() {
            assert_eq!(attempt.status, Some(200), "{attempt:?}");
        }
    }
    // A pipe has 64 kB, which is about 90 lines.
    let written = agent.metric("kiam_audit_lines_total");
    assert!((20..200).contains(&written), "{written}");
    let lost: u64 = DROPPED.iter().map(|reason| dropped(&agent, reason)).sum();
    assert_eq!(lost, 0, "they wait in the queue");
    lab.assert_served(&pods[0], "role-0");
}
