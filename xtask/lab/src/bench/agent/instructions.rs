//! The agent's instructions for each request, as callgrind counts them. They hardly depend on what else the machine does.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::loopback::{self, LoopbackNode};
use serde::Serialize;
use tokio::time::Instant;

use super::Figure;
use xtask::command::{command, run};

/// Requests that are counted, on one connection, after as many that are not.
const REQUESTS: u64 = 1_000;
const SHOWN: usize = 10;
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/bench";
/// Under valgrind everything takes fifty times as long.
const LIMIT: Duration = Duration::from_secs(300);

/// Instructions of a request, by function, without what the function calls.
pub(super) type Counts = BTreeMap<String, u64>;

/// One function's instructions for each request.
#[derive(Debug, Serialize)]
pub(super) struct Function {
    name: String,
    /// Now, and in the earlier agent.
    now: u64,
    before: Option<u64>,
}

/// Counts those of `agent`, which has symbols, for credentials by IMDSv1 on a kept connection.
pub(super) fn count(agent: &Path) -> Result<Counts> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let (out, script) = (folder.path().join("callgrind"), folder.path().join("agent"));
    let agent = agent.canonicalize().with_context(|| format!("no agent {}", agent.display()))?;
    let text = format!(
        "#!/bin/sh\nexec valgrind --tool=callgrind --instr-atstart=no --callgrind-out-file={} {} \"$@\"\n",
        out.display(),
        agent.display()
    );
    fs::write(&script, text).context("writing a script")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("its permissions")?;
    let pod = loopback::pod(1).role("bench").running(&[IpAddr::from([127, 0, 0, 1])]);
    let flags = ["--level=info", "--pod-rate=1000000:1000000"];
    let node = LoopbackNode::start_by(&script, &flags, |kubernetes, _| {
        loopback::schedule(kubernetes, &pod);
    })?;
    let begun = Instant::now();
    let connect = || TcpStream::connect(node.agent.pods()).context("connecting");
    // By IMDSv1: the clock of tokens is read by ways that valgrind does not know.
    let (mut stream, length) = loop {
        let mut stream = connect()?;
        if let Ok(length) = ask(&mut stream, None) {
            break (stream, length);
        }
        ensure!(begun.elapsed() < LIMIT, "the pod gets no credentials");
        std::thread::sleep(Duration::from_millis(200));
    };
    let pid = node.agent.pid().to_string();
    let switch = |state: &str| run(command("callgrind_control").args(["-i", state, &pid]));
    ask_often(&mut stream, length)?;
    switch("on")?;
    ask_often(&mut stream, length)?;
    switch("off")?;
    let mut node = node;
    node.agent.terminate()?;
    let counted = fs::read_to_string(&out).context("reading what callgrind counted")?;
    Ok(parse(&counted).into_iter().map(|(name, all)| (name, all / REQUESTS)).collect())
}

fn ask_often(stream: &mut TcpStream, length: usize) -> Result<()> {
    (0..REQUESTS).try_for_each(|_| ask(stream, Some(length)).map(drop))
}

/// Sends a request and reads its answer, whose length is known after the first one.
fn ask(stream: &mut TcpStream, length: Option<usize>) -> Result<usize> {
    let request = format!("GET {CREDENTIALS} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    stream.write_all(request.as_bytes()).context("sending a request")?;
    let mut answer = vec![0; length.unwrap_or(16 * 1024)];
    let read = match length {
        Some(_) => stream.read_exact(&mut answer).map(|()| answer.len()),
        None => stream.read(&mut answer),
    };
    let read = read.context("reading an answer")?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "the request was rejected");
    Ok(read)
}

/// The instructions of each function in callgrind's format, without those of its callees.
/// <https://valgrind.org/docs/manual/cl-format.html>
fn parse(text: &str) -> Counts {
    let (mut names, mut counts) = (BTreeMap::new(), Counts::new());
    let (mut function, mut is_call) = (String::new(), false);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            let (id, name) = name.split_once(' ').unwrap_or((name, ""));
            if !name.is_empty() {
                names.insert(id.to_owned(), name.to_owned());
            }
            function = names.get(id).cloned().unwrap_or_default();
        } else if let Some(name) = line.strip_prefix("cfn=") {
            if let Some((id, name)) = name.split_once(' ') {
                names.insert(id.to_owned(), name.to_owned());
            }
        } else if line.starts_with("calls=") {
            is_call = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            let cost = line.split(' ').nth(1).and_then(|cost| cost.parse::<u64>().ok());
            if !std::mem::take(&mut is_call) {
                *counts.entry(function.clone()).or_default() += cost.unwrap_or(0);
            }
        }
    }
    counts
}

/// All instructions of a request.
pub(super) fn figures(now: &Counts, before: Option<&Counts>) -> Vec<Figure> {
    let all = |counts: &Counts| counts.values().sum::<u64>() as f64;
    let figure =
        |name: &str, counts| Figure::one("instructions", name, "instructions", all(counts));
    let now = figure("credentials, kept connection", now);
    let before = before.map(|counts| figure("the same, in the earlier agent", counts));
    [now].into_iter().chain(before).collect()
}

/// The costliest functions of either agent.
pub(super) fn functions(now: &Counts, before: Option<&Counts>) -> Vec<Function> {
    let costliest = |counts: &Counts| -> Vec<String> {
        let mut sorted: Vec<_> = counts.iter().collect();
        sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        sorted.into_iter().take(SHOWN).map(|(name, _)| name.clone()).collect()
    };
    let mut names = before.map(costliest).unwrap_or_default();
    names.extend(costliest(now));
    let of = |name: &str, counts: &Counts| counts.get(name).copied().unwrap_or(0);
    let mut functions: Vec<_> = names
        .into_iter()
        .map(|name| Function {
            now: of(&name, now),
            before: before.map(|counts| of(&name, counts)),
            name,
        })
        .collect();
    functions.sort_by(|one, other| one.name.cmp(&other.name));
    functions.dedup_by(|one, other| one.name == other.name);
    functions.sort_by_key(|it| std::cmp::Reverse(it.before.unwrap_or(0).max(it.now)));
    functions
}

// === impl Function ===

impl Function {
    /// The row of a table.
    pub(super) fn row(&self) -> Vec<String> {
        let before = self.before.map_or(String::new(), |count| count.to_string());
        vec![format!("`{}`", shortened(&self.name)), before, self.now.to_string()]
    }
}

/// A symbol without its hash and its longest parts.
fn shortened(name: &str) -> String {
    const MOST: usize = 90;
    let name = name.replace('|', "/").replace('`', "'");
    let shown: String = name.chars().take(MOST).collect();
    if shown.len() < name.len() { format!("{shown}…") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_a_functions_own() {
        let text = "events: Ir\n\nfl=(1) a.rs\nfn=(1) outer\n16 400\ncfn=(2) inner\ncalls=3 20\n17 900\n18 7\n\n\
            fn=(2)\n20 600\n+1 300\n* 5\n\nfn=(1)\n30 3\n\ntotals: 1315\n";
        let counts = parse(text);
        assert_eq!(counts, Counts::from([("outer".into(), 410), ("inner".into(), 905)]));
    }

    #[test]
    fn costliest_functions_of_either_agent_are_shown() {
        let counts = |all: &[(&str, u64)]| -> Counts {
            all.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
        };
        let (now, before) = (counts(&[("a", 5), ("b", 50)]), counts(&[("a", 500), ("c", 20)]));
        let found: Vec<_> = functions(&now, Some(&before))
            .into_iter()
            .map(|it| (it.name, it.before.unwrap(), it.now))
            .collect();
        let expected = [("a", 500, 5), ("b", 0, 50), ("c", 20, 0)];
        assert_eq!(found, expected.map(|(name, before, now)| (name.to_owned(), before, now)));
    }
}
