//! The form of a line: one JSON object. Its fields are documented in `docs/audit.md`.

use std::time::SystemTime;

use serde::Serialize;

use super::{
    hand_out::{HandOut, Path, escaped},
    shares::Entry,
    unusual::Reason,
};
use kiam_core::{
    pods::{CallingProcess, Executable, Inspection, Relative},
    role::RoleArn,
};

/// The most characters of a program's path. With it, a line is below 4,096 bytes, so that a pipe takes it whole.
const MAX_PATH: usize = 384;
/// The most characters of another process's name.
const MAX_COMM: usize = 64;

#[derive(Serialize)]
struct Line<'a> {
    /// The kind of line, which tells the audit's lines from the log's.
    audit: &'static str,
    time: String,
    count: u64,
    coalesced: bool,
    access_key_id: &'a str,
    role: String,
    session_name: &'a str,
    expires: String,
    pod: LinePod<'a>,
    container: Option<&'a str>,
    process: Option<LineProcess>,
    parent: Option<LineParent>,
    connection: Option<u64>,
    path: Path,
    imds: &'static str,
    user_agent: Option<&'a str>,
    unusual: &'a [Reason],
}

#[derive(Serialize)]
struct LinePod<'a> {
    namespace: &'a str,
    name: &'a str,
    uid: String,
}

#[derive(Serialize)]
struct LineProcess {
    pid: u32,
    thread: u32,
    comm: String,
    executable: Option<String>,
    executable_state: &'static str,
}

#[derive(Serialize)]
struct LineParent {
    pid: u32,
    comm: String,
    executable: Option<String>,
}

/// The line of `entry`, with its end.
pub(super) fn line(entry: &Entry) -> Vec<u8> {
    let hand_out: &HandOut = &entry.hand_out;
    let inspection = hand_out.inspection();
    let pod = &hand_out.pod;
    let line = Line {
        audit: "credentials",
        time: time(hand_out.time),
        count: entry.count,
        coalesced: entry.coalesced,
        access_key_id: &hand_out.access_key_id,
        role: RoleArn::to_string(&hand_out.role),
        session_name: hand_out.session_name.as_ref(),
        expires: time(hand_out.expires),
        pod: LinePod { namespace: &pod.namespace, name: &pod.name, uid: pod.uid.to_string() },
        container: hand_out.opener.as_ref().and_then(|it| it.container.as_ref()).map(AsRef::as_ref),
        process: hand_out.process().map(|process| LineProcess::new(process, inspection)),
        parent: inspection.and_then(|it| it.parent.as_ref()).map(LineParent::new),
        connection: hand_out.opener.as_ref().map(|opener| opener.socket),
        path: hand_out.path,
        imds: if hand_out.has_token { "v2" } else { "v1" },
        user_agent: hand_out.user_agent.as_deref(),
        unusual: hand_out.unusual.get().map_or(&[], Vec::as_slice),
    };
    let mut text = serde_json::to_vec(&line).expect("texts and numbers are JSON");
    text.push(b'\n');
    text
}

// === impl LineProcess ===

impl LineProcess {
    fn new(process: &CallingProcess, inspection: Option<&Inspection>) -> Self {
        let (executable, executable_state) = match inspection.map(|it| &it.executable) {
            Some(Executable::Running(path)) => (Some(path), "running"),
            Some(Executable::Changed(path)) => (Some(path), "changed"),
            Some(Executable::Gone) => (None, "gone"),
            Some(Executable::Unreadable) | None => (None, "unreadable"),
        };
        Self {
            pid: process.pid,
            thread: process.thread,
            comm: process.comm.to_string(),
            executable: executable.map(|path| escaped(path, MAX_PATH)),
            executable_state,
        }
    }
}

// === impl LineParent ===

impl LineParent {
    fn new(parent: &Relative) -> Self {
        Self {
            pid: parent.pid,
            comm: escaped(&parent.comm, MAX_COMM),
            executable: parent.executable.as_ref().map(|path| escaped(path, MAX_PATH)),
        }
    }
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
