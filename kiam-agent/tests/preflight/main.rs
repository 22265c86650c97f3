//! `kiam-agent preflight` on the lab's node: each check is read after what it checks was broken, and the node is the same
//! afterwards.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy knows no test helpers outside #[test] functions"
)]

mod kernel_rows;
mod network_rows;
mod page;
mod run;
mod server_rows;
mod whole;

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
    thread,
};

use kiam_core::preflight::{
    Topic,
    Verdict::{self, Ok as Good},
};
use lab::Lab;

use self::run::{Played, Setting};

/// Checks of what can't be broken here. Their readers are tested with the texts that such systems have.
const NOT_BROKEN: [Topic; 3] = [Topic::Apparmor, Topic::Selinux, Topic::Lockdown];
/// Rows that are played at once.
const AT_ONCE: usize = 3;

/// How a node is broken, and the line that says so.
struct Row {
    name: &'static str,
    topic: Topic,
    verdict: Verdict,
    /// What the line has, of the finding or the remedy.
    says: &'static [&'static str],
    breaks: fn(&Lab) -> Setting,
}

const fn row(
    name: &'static str,
    topic: Topic,
    verdict: Verdict,
    says: &'static [&'static str],
    breaks: fn(&Lab) -> Setting,
) -> Row {
    Row { name, topic, verdict, says, breaks }
}

/// Plays each row on a node of its own, and fails with all that went wrong.
fn play(rows: &[Row]) {
    if lab::skip!() {
        return;
    }
    let (next, failures) = (Mutex::new(rows.iter()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(rows.len()) {
            scope.spawn(|| {
                loop {
                    let Some(row) = next.lock().unwrap().next() else { return };
                    // A panic's message is on the console.
                    if catch_unwind(AssertUnwindSafe(|| row.play())).is_err() {
                        failures.lock().unwrap().push(row.name);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "see above: {failures:?}");
}

impl Row {
    fn play(&self) {
        let lab = Lab::start().unwrap();
        // The setting may forbid the thread system calls, which it never gets back.
        let played = thread::scope(|scope| {
            scope.spawn(|| (self.breaks)(&lab).play(&lab)).join().expect("the setting is made")
        });
        let Played { status, checks, .. } = &played;
        let found = checks.iter().find(|check| check.name == self.topic.name());
        let found = found.unwrap_or_else(|| panic!("{}: no such line: {played:?}", self.name));
        let text = format!("{} / {}", found.finding, found.remedy);
        assert_eq!(found.verdict, self.verdict.to_string(), "{}: {text}", self.name);
        for part in self.says {
            assert!(text.contains(part), "{}: no {part:?} in {text}", self.name);
        }
        assert_eq!(found.verdict == "ok", found.remedy.is_empty(), "{}: {text}", self.name);
        let fails = checks.iter().any(|check| check.verdict == "fail");
        assert_eq!(*status, Some(i32::from(fails)), "{}: {played:?}", self.name);
    }
}

#[test]
fn what_the_kernel_lacks_is_in_its_line() {
    play(kernel_rows::ROWS);
}

#[test]
fn what_the_nodes_network_lacks_is_in_its_line() {
    play(network_rows::ROWS);
}

#[test]
fn what_servers_lack_is_in_its_line() {
    play(server_rows::ROWS);
}

#[test]
fn each_check_is_broken_by_a_row() {
    let rows = [kernel_rows::ROWS, network_rows::ROWS, server_rows::ROWS];
    let rows = rows.into_iter().flatten();
    let broken: BTreeSet<Topic> =
        rows.filter(|row| row.verdict != Good).map(|row| row.topic).collect();
    let all: BTreeSet<Topic> = Topic::ALL.iter().copied().collect();
    let missing: Vec<_> = all.difference(&broken).copied().collect();
    assert_eq!(missing, NOT_BROKEN);
}
