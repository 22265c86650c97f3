//! The tables of `docs/kernels.md`.

use anyhow::Result;

use super::job::{FAILED, Report};
use xtask::page;

/// Guest by guest, each with its kernel and what was on its command line.
pub(super) fn table(guests: &[(&str, &Report)]) -> String {
    let has_parameters = guests.iter().any(|(parameters, _)| !parameters.is_empty());
    let mut checks: Vec<&str> = Vec::new();
    for (check, _) in guests.iter().flat_map(|(_, report)| &report.rows) {
        if !checks.contains(&check.as_str()) {
            checks.push(check);
        }
    }
    let mut head = vec!["kernel".to_owned(), "Debian's version".to_owned()];
    head.extend(has_parameters.then(|| "command line".to_owned()));
    head.extend(checks.iter().map(|check| format!("`{check}`")));
    let rows = guests.iter().map(|(parameters, report)| {
        let mut cells = vec![format!("`{}`", report.release), report.version.clone()];
        cells.extend(has_parameters.then(|| match *parameters {
            "" => "plain".to_owned(),
            parameters => format!("`{parameters}`"),
        }));
        cells.extend(checks.iter().map(|check| {
            let result = report.rows.iter().find(|(name, _)| name == check);
            result.map_or("not run", |(_, result)| short(result)).to_owned()
        }));
        cells
    });
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    page::table(&head, 0..head.len(), rows)
}

/// A failure has a verifier's log, which is no phrase.
fn short(result: &str) -> &str {
    if result.starts_with(FAILED) { "**FAILED**" } else { result }
}

/// Puts the table of `check` in its place in `docs/kernels.md`.
pub(super) fn write(check: &str, table: &str) -> Result<()> {
    page::write("docs/kernels.md", &format!("cargo xtask test kernels --checks {check}"), table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_names_command_lines_that_differ_and_shows_no_logs() {
        let report = |release: &str, result: &str| Report {
            release: release.to_owned(),
            version: "1".to_owned(),
            rows: vec![("defaults".to_owned(), result.to_owned())],
            ..Report::default()
        };
        let (old, new) = (report("5.10", "FAILED: a | log"), report("6.1", "loaded"));
        let plain = table(&[("", &old), ("", &new)]);
        let rows = "| kernel | Debian's version | `defaults` |\n| --- | --- | --- |\n\
            | `5.10` | 1 | **FAILED** |\n| `6.1` | 1 | loaded |\n";
        assert_eq!(plain, rows);
        let table = table(&[("", &old), ("ipv6.disable=1", &new)]);
        assert!(table.contains("| `6.1` | 1 | `ipv6.disable=1` | loaded |\n"), "{table}");
    }
}
