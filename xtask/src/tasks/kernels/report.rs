//! The tables of `docs/kernels.md`.

use anyhow::Result;

use super::{
    check::Check,
    job::{FAILED, Report},
};
use xtask::page;

const PAGE: &str = "docs/kernels.md";
/// The columns that say which guest it was.
const GUEST: [&str; 3] = ["kernel", "Debian's version", "command line"];
const NOT_RUN: &str = "not run";

/// A table of the page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// What guests that did the same reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Results {
    /// Guest by guest, with a column for each of what they did.
    checks: Table,
    /// The tests that were left out, by reason. Without rows it is not shown.
    left_out: Table,
}

// === impl Table ===

impl Table {
    fn new(head: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    fn read(text: &str) -> Self {
        let cells = |line: &str| -> Option<Vec<String>> {
            let line = line.strip_prefix("| ")?.strip_suffix(" |")?;
            Some(line.split(" | ").map(str::to_owned).collect())
        };
        let mut lines = text.lines().filter_map(cells);
        let head = lines.next().unwrap_or_default();
        Self { head, rows: lines.skip(1).collect() }
    }

    fn show(&self) -> String {
        let head: Vec<&str> = self.head.iter().map(String::as_str).collect();
        page::table(&head, 0..head.len(), self.rows.iter().cloned())
    }

    fn cell<'a>(&self, row: &'a [String], column: &str) -> Option<&'a str> {
        let at = self.head.iter().position(|head| head == column)?;
        row.get(at).map(String::as_str)
    }

    /// What says which guest a row is of.
    fn guest<'a>(&self, row: &'a [String]) -> [Option<&'a str>; 3] {
        GUEST.map(|column| self.cell(row, column))
    }

    /// Puts what ran later over this: its cells, and its guests and columns that are not here.
    fn overlay(&mut self, later: &Self) {
        for column in &later.head {
            if !self.head.contains(column) {
                self.head.push(column.clone());
                self.rows.iter_mut().for_each(|row| row.push(NOT_RUN.to_owned()));
            }
        }
        for new in &later.rows {
            let known = self.rows.iter().position(|row| self.guest(row) == later.guest(new));
            let mut row = match known {
                Some(at) => self.rows[at].clone(),
                None => vec![NOT_RUN.to_owned(); self.head.len()],
            };
            for (cell, column) in row.iter_mut().zip(&self.head) {
                let result = later.cell(new, column).filter(|result| *result != NOT_RUN);
                if let Some(result) = result {
                    *cell = result.to_owned();
                }
            }
            match known {
                Some(at) => self.rows[at] = row,
                None => self.rows.push(row),
            }
        }
    }
}

// === impl Results ===

impl Results {
    /// Of guests, each with what was on its kernel's command line.
    pub(super) fn of(guests: &[(&str, &Report)]) -> Self {
        Self { checks: checks(guests), left_out: left_out(guests) }
    }

    pub(super) fn show(&self) -> String {
        let left_out = &self.left_out;
        let further = (!left_out.rows.is_empty()).then(|| format!("\n{}", left_out.show()));
        self.checks.show() + &further.unwrap_or_default()
    }

    fn read(text: &str) -> Self {
        let (checks, left_out) = text.split_once("\n\n").unwrap_or((text, ""));
        Self { checks: Table::read(checks), left_out: Table::read(left_out) }
    }

    /// Puts what ran later over this.
    fn overlay(&mut self, later: &Self) {
        let (columns, rows) = (&later.checks, &later.checks.rows);
        self.left_out.rows.retain(|old| {
            let [kernel, test] = [0, 1].map(|at| old.get(at).map_or("", String::as_str));
            let again = |row: &&Vec<String>| row.first().is_some_and(|of| of == kernel);
            let again = rows.iter().find(again).and_then(|row| columns.cell(row, test));
            again.is_none_or(|result| result == NOT_RUN)
        });
        self.checks.overlay(&later.checks);
        self.left_out.head.clone_from(&later.left_out.head);
        self.left_out.rows.extend_from_slice(&later.left_out.rows);
    }

    /// Puts the results of `check` in their place in the page. Unless they are of all guests, what others reported before
    /// stays there.
    pub(super) fn write(&self, check: Check, are_all: bool) -> Result<()> {
        let command = format!("cargo xtask test kernels --checks {check}");
        if are_all {
            return page::write(PAGE, &command, &self.show());
        }
        let mut results = Self::read(&page::written(PAGE, &command)?);
        results.overlay(self);
        page::write(PAGE, &command, &results.show())
    }
}

fn checks(guests: &[(&str, &Report)]) -> Table {
    let has_parameters = guests.iter().any(|(parameters, _)| !parameters.is_empty());
    let mut checks: Vec<&str> = Vec::new();
    for (check, _) in guests.iter().flat_map(|(_, report)| &report.rows) {
        if !checks.contains(&check.as_str()) {
            checks.push(check);
        }
    }
    let mut table = Table::new(GUEST.iter().copied().take(if has_parameters { 3 } else { 2 }));
    table.head.extend(checks.iter().map(|check| format!("`{check}`")));
    table.rows.extend(guests.iter().map(|(parameters, report)| {
        let mut cells = vec![format!("`{}`", report.release), report.version.clone()];
        cells.extend(has_parameters.then(|| match *parameters {
            "" => "plain".to_owned(),
            parameters => format!("`{parameters}`"),
        }));
        cells.extend(checks.iter().map(|check| {
            let result = report.rows.iter().find(|(name, _)| name == check);
            result.map_or(NOT_RUN, |(_, result)| short(result)).to_owned()
        }));
        cells
    }));
    table
}

fn left_out(guests: &[(&str, &Report)]) -> Table {
    let mut table = Table::new(["kernel", "of", "left out", "reason"]);
    for (_, report) in guests {
        for (job, test, why) in &report.left_out {
            let (kernel, job) = (format!("`{}`", report.release), format!("`{job}`"));
            let same = |row: &&mut Vec<String>| (&row[0], &row[1], &row[3]) == (&kernel, &job, why);
            match table.rows.iter_mut().find(same) {
                Some(row) => row[2] += &format!(", `{test}`"),
                None => table.rows.push(vec![kernel, job, format!("`{test}`"), why.clone()]),
            }
        }
    }
    table
}

/// A failure has a verifier's log, which is no phrase.
fn short(result: &str) -> &str {
    if result.starts_with(FAILED) { "**FAILED**" } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(release: &str, rows: &[(&str, &str)]) -> Report {
        let owned = |(name, result): &(&str, &str)| ((*name).to_owned(), (*result).to_owned());
        Report {
            release: release.to_owned(),
            version: "1".to_owned(),
            rows: rows.iter().map(owned).collect(),
            ..Report::default()
        }
    }

    #[test]
    fn a_table_names_command_lines_that_differ_and_shows_no_logs() {
        let old = report("5.10", &[("defaults", "FAILED: a | log")]);
        let new = report("6.1", &[("defaults", "loaded")]);
        let plain = Results::of(&[("", &old), ("", &new)]).show();
        let rows = "| kernel | Debian's version | `defaults` |\n| --- | --- | --- |\n\
            | `5.10` | 1 | **FAILED** |\n| `6.1` | 1 | loaded |\n";
        assert_eq!(plain, rows);
        let table = Results::of(&[("", &old), ("ipv6.disable=1", &new)]).show();
        assert!(table.contains("| `6.1` | 1 | `ipv6.disable=1` | loaded |\n"), "{table}");
    }

    #[test]
    fn what_ran_later_replaces_its_own_cells_alone() {
        let mut old = report("5.10", &[("node", "FAILED: exit"), ("guard", "2 passed")]);
        let left_out = |job: &str, test: &str| (job.to_owned(), test.to_owned(), "why".to_owned());
        old.left_out = vec![left_out("node", "a"), left_out("guard", "b"), left_out("guard", "c")];
        let middle = report("6.1", &[("guard", "4 passed")]);
        let page = Results::of(&[("", &old), ("", &middle)]).show();
        let mut again = report("5.10", &[("node", "9 passed"), ("matrix", "3 passed")]);
        again.left_out = vec![left_out("matrix", "d")];
        let newest = report("6.12", &[("node", "9 passed")]);
        let mut results = Results::read(&page);
        assert_eq!(results.show(), page);
        results.overlay(&Results::of(&[("", &again), ("", &newest)]));
        let expected = "| kernel | Debian's version | `node` | `guard` | `matrix` |\n\
            | --- | --- | --- | --- | --- |\n\
            | `5.10` | 1 | 9 passed | 2 passed | 3 passed |\n\
            | `6.1` | 1 | not run | 4 passed | not run |\n\
            | `6.12` | 1 | 9 passed | not run | not run |\n\
            \n\
            | kernel | of | left out | reason |\n\
            | --- | --- | --- | --- |\n\
            | `5.10` | `guard` | `b`, `c` | why |\n\
            | `5.10` | `matrix` | `d` | why |\n";
        assert_eq!(results.show(), expected);
        // Where nothing was written yet.
        let mut results = Results::read("Not run yet.");
        results.overlay(&Results::of(&[("", &newest)]));
        assert_eq!(results, Results::of(&[("", &newest)]));
    }
}
