//! `cargo xtask test node-vm`, the agent on a node with systemd, cgroup v2 alone, and containerd that asks systemd for
//! cgroups, which another kernel runs as processes of this machine: user-mode Linux.
//!
//! Nothing is installed. The node's disk is made once, in `target/tools`, and what a run changes of it goes with the run.

mod agent_pod;
mod client;
mod guest;
mod lives;
mod machine;
mod manifest;
mod networkd;
mod power;
mod rows;
mod stage;

use std::{fmt, fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};

use self::machine::Machine;
pub(crate) use self::{guest::main as in_guest, stage::Owner};
use xtask::{
    command::{self, command, say, workspace},
    page,
};

/// How long one life of the node may take: minutes, on a busy machine many.
const LIMIT: Duration = Duration::from_secs(3600);
/// If set: parts of rows' names, separated by commas; of the first life only these rows are played, and the first.
const ROWS: &str = "KIAM_NODE_VM_ROWS";

/// One life of the node. Each ends by a loss of power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// The agent comes, works, is replaced and killed, and goes on.
    Work,
    /// The pods start before the agent does.
    Unguarded,
    /// The same with a boot guard. In the end the agent is uninstalled.
    Guarded,
}

/// What came of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) passed: bool,
    pub(crate) seconds: u64,
    /// What was counted, or why it failed.
    pub(crate) said: String,
}

// === impl Life ===

impl Life {
    const ALL: [Self; 3] = [Self::Work, Self::Unguarded, Self::Guarded];

    fn name(self) -> &'static str {
        match self {
            Self::Work => "work",
            Self::Unguarded => "unguarded",
            Self::Guarded => "guarded",
        }
    }

    fn named(name: &str) -> Result<Self> {
        let life = Self::ALL.into_iter().find(|life| life.name() == name);
        life.with_context(|| format!("{name:?} is no life of the node"))
    }
}

// === impl Outcome ===

impl Outcome {
    /// From a line of the guest's report, as [`fmt::Display`] writes it.
    fn read(line: &str) -> Option<Self> {
        let mut fields = line.splitn(4, '\t');
        let (name, result) = (fields.next()?, fields.next()?);
        let (seconds, said) = (fields.next()?.parse().ok()?, fields.next()?.to_owned());
        Some(Self { name: name.to_owned(), passed: result == "passed", seconds, said })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let result = if self.passed { "passed" } else { "FAILED" };
        let said = self.said.replace(['\n', '\t'], " ");
        write!(f, "{}\t{result}\t{}\t{said}", self.name, self.seconds)
    }
}

/// Lets the node that `xtask/node-vm/build.sh` made in `node` live its lives, and shows what came of each row.
pub(crate) fn run(node: &Path) -> Result<()> {
    let machine = Machine::new(node.to_owned(), &workspace().join("target/tmp"))?;
    for program in ["kiam-agent", "lab"] {
        share(program, &machine.shared())?;
    }
    let chosen = std::env::var(ROWS).unwrap_or_default();
    fs::write(machine.shared().join(guest::CHOSEN), &chosen)
        .context("telling the node its rows")?;
    let mut outcomes = Vec::new();
    let mut end = Ok(());
    for life in Life::ALL {
        say(format!("the node's life: {}", life.name()));
        end = machine.live(life, LIMIT, |outcome| {
            say(shown(&outcome));
            outcomes.push(outcome);
        });
        if end.is_err() {
            break;
        }
    }
    eprintln!();
    outcomes.iter().for_each(|outcome| eprintln!("{}", shown(outcome)));
    let failed = outcomes.iter().any(|outcome| !outcome.passed);
    if failed || end.is_err() {
        say(format!("the node's logs are kept in {}", machine.keep().display()));
    }
    end?;
    ensure!(!failed, "rows failed");
    if chosen.is_empty() {
        page::write("docs/clusters.md", "cargo xtask test node-vm", &table(&outcomes))?;
    }
    Ok(())
}

/// What came of each row, for a page.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let row = |outcome: &Outcome| {
        let result = if outcome.passed { "passed" } else { "FAILED" };
        vec![outcome.name.clone(), result.to_owned(), outcome.said.clone()]
    };
    page::table(&["what", "result", "seen"], 0..3, outcomes.iter().map(row))
}

/// As a line of a table.
pub(crate) fn shown(outcome: &Outcome) -> String {
    let result = if outcome.passed { "passed" } else { "FAILED" };
    format!("{:<28} {result} {:>4} s  {}", outcome.name, outcome.seconds, outcome.said)
}

/// Puts a program where the node finds it, without what only debuggers read.
pub(crate) fn share(name: &str, folder: &Path) -> Result<()> {
    let built = std::env::current_exe().context("finding this program")?;
    let built = built.with_file_name(name);
    fs::metadata(&built).with_context(|| format!("{} is not built", built.display()))?;
    command::run(command("strip").arg("-o").arg(folder.join(name)).arg(built))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        let said = "two\nlines\tand a tab".to_owned();
        let failed = Outcome { name: "power loss".into(), passed: false, seconds: 7, said };
        let read = Outcome::read(&failed.to_string()).unwrap();
        assert_eq!(read, Outcome { said: "two lines and a tab".into(), ..failed });
        assert_eq!(Outcome::read("kernel panic"), None);
    }
}
