//! What a guest does, one program after the other, and how its console tells what came of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Before what a guest reports, on a line of its own; kiam-agent's tests `programs` and `kernels` write it too.
pub(super) const MARK: &str = "kiam-kernels:";
/// A guest's name for its kernel, for the begin and the end of a job, and for its own end.
pub(super) const KERNEL: &str = "kernel";
pub(super) const BEGIN: &str = "begin";
pub(super) const DONE: &str = "done";
pub(super) const END: &str = "end";
/// What came of a job, or of a guest, that did what it should.
pub(super) const PASSED: &str = "passed";
/// How a result begins that fails the run.
pub(super) const FAILED: &str = "FAILED";
/// What a test writes that leaves itself out, before the reason: on this kernel there is nothing to test.
const LEFT_OUT: &str = "left out: ";
/// What a test writes that has no program or right that it needs. In a guest it must have them.
const SKIPPED: &str = "skipped: ";

/// One program that a guest runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// What it is called in the table.
    pub(super) name: String,
    /// The program, by its path in the guest.
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Of its environment.
    pub(super) variable: Option<(String, String)>,
    /// For how long it may run, by the guest's clock, which counts its instructions.
    pub(super) seconds: u64,
    pub(super) reports: Reports,
}

/// How a program tells what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Reports {
    /// By marked lines, one a row of the table.
    Rows,
    /// As tests do, by a last line with their number.
    Tests,
    /// As the demo does, by its verdict.
    Verdict,
}

/// What a guest's console says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// As `uname -r` has it.
    pub(super) release: String,
    /// Debian's version of it.
    pub(super) version: String,
    /// By the name of a row, what came of it.
    pub(super) rows: Vec<(String, String)>,
    /// By the name of a job, the tests that were left out, each with the reason.
    pub(super) left_out: Vec<(String, String, String)>,
    /// Why the run fails, if it does.
    pub(super) failures: Vec<String>,
}

// === impl Job ===

impl Job {
    /// What `output` says of this job, which ended with `status`; nothing where its rows said it.
    fn result(&self, status: &str, output: &[&str]) -> Option<String> {
        let last = |start: &str| {
            output.iter().rev().find_map(|line| line.split_once(start).map(|(_, rest)| rest))
        };
        let said = match self.reports {
            Reports::Rows => None,
            Reports::Tests => last("test result: ok. ").and_then(|rest| passed(rest, output)),
            Reports::Verdict => last("Verdict: all of it is true (")
                .map(|rest| rest.split_once(')').map_or(rest, |(checks, _)| checks).to_owned()),
        };
        match (status == PASSED, said) {
            (true, Some(said)) => Some(said),
            // A row that failed says more.
            (true, None) if self.reports == Reports::Rows => None,
            _ if self.reports == Reports::Rows && output.iter().any(|line| is_failed_row(line)) => {
                None
            }
            _ => Some(format!("{FAILED}: {status}{}", failed_tests(output))),
        }
    }
}

/// What is to be said of tests that passed, by their last line; nothing where one of them was skipped.
fn passed(last: &str, output: &[&str]) -> Option<String> {
    if output.iter().any(|line| line.contains(SKIPPED)) {
        return None;
    }
    let passed: usize = last.split_once(" passed;")?.0.parse().ok()?;
    Some(match output.iter().filter_map(|line| left_out(line)).count() {
        0 => format!("{passed} passed"),
        count => format!("{} passed, {count} left out", passed - count),
    })
}

/// The test that leaves itself out on this line, and the reason.
fn left_out(line: &str) -> Option<(&str, &str)> {
    line.split_once(LEFT_OUT)?.1.trim().split_once(": ")
}

/// What comes after the mark on `line`, in two.
fn marked(line: &str) -> Option<(&str, &str)> {
    line.split_once(MARK).and_then(|(_, rest)| rest.trim().split_once(": "))
}

fn is_failed_row(line: &str) -> bool {
    marked(line).is_some_and(|(_, result)| result.starts_with(FAILED))
}

/// The tests that failed, by the list at their end, and those that were skipped.
fn failed_tests(output: &[&str]) -> String {
    let list = output.iter().rposition(|line| line.trim() == "failures:");
    let failed = output.iter().skip(list.map_or(output.len(), |at| at + 1));
    let failed = failed.map_while(|line| line.strip_prefix("    ")).map(str::trim);
    let failed: Vec<&str> = failed.collect();
    let skipped = output.iter().filter_map(|line| Some(line.split_once(SKIPPED)?.1.trim()));
    let skipped: Vec<&str> = skipped.collect();
    let part = |what: &str, all: &[&str]| match all {
        [] => String::new(),
        all => format!("; {what}: {}", all.join(", ")),
    };
    part("failed", &failed) + &part("skipped", &skipped)
}

// === impl Report ===

impl Report {
    /// Reads what the console of a guest with these jobs says.
    pub(super) fn read(console: &str, jobs: &[Job]) -> Self {
        let mut report = Self::default();
        let mut passed = false;
        let mut output = Vec::new();
        for line in console.lines() {
            output.push(line);
            let Some((name, rest)) = marked(line) else { continue };
            match name {
                KERNEL => {
                    let (release, version) = rest.split_once(' ').unwrap_or((rest, ""));
                    report.release = release.to_owned();
                    report.version = debian_version(version).to_owned();
                }
                BEGIN => output.clear(),
                DONE => report.finish(jobs, rest, &output),
                END => passed = rest == PASSED,
                name => report.rows.push((name.to_owned(), rest.to_owned())),
            }
        }
        let failed = report.rows.iter().filter(|(_, result)| result.starts_with(FAILED));
        report.failures =
            failed.map(|(row, result)| format!("{}, {row}: {result}", report.release)).collect();
        if report.failures.is_empty() && (!passed || report.rows.is_empty()) {
            report
                .failures
                .push(format!("{}: the tests did not come to their end", report.release));
        }
        report
    }

    fn finish(&mut self, jobs: &[Job], done: &str, output: &[&str]) {
        let ended =
            |job: &&Job| done.strip_prefix(&job.name)?.strip_prefix(": ").map(str::to_owned);
        for (job, status) in jobs.iter().filter_map(|job| Some((job, ended(&job)?))) {
            let left_out = output.iter().filter_map(|line| left_out(line));
            self.left_out.extend(
                left_out.map(|(test, why)| (job.name.clone(), test.to_owned(), why.to_owned())),
            );
            if let Some(result) = job.result(&status, output) {
                self.rows.push((job.name.clone(), result));
            }
        }
    }
}

/// `#1 SMP Debian 5.10.262-1 (2026-01-01)` is version 5.10.262-1.
fn debian_version(text: &str) -> &str {
    let version = text.split_once("Debian ").and_then(|(_, rest)| rest.split(' ').next());
    version.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "[    0.1] noise\r\nkiam-kernels: kernel: 5.10.0-46-cloud-amd64 #1 SMP Debian 5.10.262-1 (2026-01-01)\r\n";
    const END: &str = "kiam-kernels: end: passed\r\n";

    fn job(name: &str, reports: Reports) -> Job {
        let (program, arguments) = (PathBuf::from("/bin/true"), Vec::new());
        Job { name: name.to_owned(), program, arguments, variable: None, seconds: 1, reports }
    }

    fn read(lines: &[&str]) -> Report {
        let jobs = [
            job("load", Reports::Rows),
            job("node", Reports::Tests),
            job("demo", Reports::Verdict),
        ];
        Report::read(&lines.concat(), &jobs)
    }

    #[test]
    fn a_guest_passes_only_by_its_last_word() {
        let loaded = "test every ... kiam-kernels: defaults: loaded\r\n";
        let refused = "kiam-kernels: --path=node: FAILED: kernel 5.10 refuses kiam_uplink\r\n";
        let (done, broken) = (
            "kiam-kernels: done: load: passed\r\n",
            "kiam-kernels: done: load: exit status: 101\r\n",
        );
        let cases = [
            (vec![HEAD, loaded, done, END], None),
            (vec![HEAD, loaded], Some("did not come to their end")),
            (vec![HEAD, done, END], Some("did not come to their end")),
            (vec![HEAD, loaded, refused, broken, END], Some("refuses kiam_uplink")),
            (vec![HEAD, loaded, broken, END], Some("load: FAILED: exit status: 101")),
            (vec![HEAD, loaded, "kiam-kernels: end: a module\r\n"], Some("their end")),
        ];
        for (lines, failure) in cases {
            let report = read(&lines);
            assert_eq!(report.release, "5.10.0-46-cloud-amd64");
            assert_eq!(report.version, "5.10.262-1");
            let failures = report.failures;
            match failure {
                None => assert!(failures.is_empty(), "{failures:?}"),
                Some(part) => assert!(failures.concat().contains(part), "{failures:?}"),
            }
        }
    }

    #[test]
    fn tests_and_the_demo_are_rows_by_what_they_say_last() {
        let passed = "test result: ok. 12 passed; 0 failed; 0 ignored; finished in 1.20s\r\n";
        let failed = "failures:\r\n    a_pod\r\n\r\ntest result: FAILED. 11 passed; 1 failed\r\n";
        let left_out = "test one ... left out: one: no listeners below 5.14\r\nok\r\n";
        let skipped = "test one ... skipped: one: no nft\r\nok\r\n";
        let verdict = "Verdict: all of it is true (41 checks).\r\n";
        let (begin, done) =
            ("kiam-kernels: begin: node\r\n", "kiam-kernels: done: node: passed\r\n");
        let broken = "kiam-kernels: done: node: exit status: 101\r\n";
        let demo = "kiam-kernels: done: demo: passed\r\n";
        let cases = [
            (vec![begin, passed, done], ("node", "12 passed")),
            (vec![begin, failed, broken], ("node", "FAILED: exit status: 101; failed: a_pod")),
            (vec![begin, left_out, passed, done], ("node", "11 passed, 1 left out")),
            (vec![begin, skipped, passed, done], ("node", "FAILED: passed; skipped: one: no nft")),
            // What another job said before it does not count.
            (vec![passed, begin, done], ("node", "FAILED: passed")),
            (vec![verdict, demo], ("demo", "41 checks")),
            (vec![demo], ("demo", "FAILED: passed")),
        ];
        for (lines, (name, result)) in cases {
            let report = read(&[&[HEAD], lines.as_slice(), &[END]].concat());
            assert_eq!(report.rows, [(name.to_owned(), result.to_owned())]);
            assert_eq!(report.failures.is_empty(), !result.starts_with("FAILED"));
        }
    }
}
