//! The tables of `docs/kernels.md`.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::job::{FAILED, Report};

/// A table is between such a line, which names its check, and the next that ends one.
const BEGIN: &str = "<!-- written by cargo xtask test kernels --checks ";
const END: &str = "<!-- end -->\n";

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
    let mut table = row(&head) + &row(&vec!["---".to_owned(); head.len()]);
    for (parameters, report) in guests {
        let mut cells = vec![format!("`{}`", report.release), report.version.clone()];
        cells.extend(has_parameters.then(|| match *parameters {
            "" => "plain".to_owned(),
            parameters => format!("`{parameters}`"),
        }));
        cells.extend(checks.iter().map(|check| {
            let result = report.rows.iter().find(|(name, _)| name == check);
            result.map_or("not run", |(_, result)| short(result)).to_owned()
        }));
        table.push_str(&row(&cells));
    }
    table
}

fn row(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

/// A failure has a verifier's log, which is no phrase.
fn short(result: &str) -> &str {
    if result.starts_with(FAILED) { "**FAILED**" } else { result }
}

/// Puts the table of `check` in its place in `document`.
pub(super) fn write(document: &Path, check: &str, table: &str) -> Result<()> {
    let shown = document.display();
    let text = fs::read_to_string(document).with_context(|| format!("reading {shown}"))?;
    let text = replaced(&text, check, table);
    let text = text.with_context(|| format!("{shown} has no place for the table of {check}"))?;
    fs::write(document, text).with_context(|| format!("writing {shown}"))
}

fn replaced(text: &str, check: &str, table: &str) -> Option<String> {
    let begin = format!("{BEGIN}{check} -->\n");
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{begin}\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_the_place_of_the_one_before_it_and_shows_no_logs() {
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
        let (load, demo) = (format!("{BEGIN}load -->\n"), format!("{BEGIN}demo -->\nx\n{END}"));
        let text = format!("# Kernels\n\n{load}old\n{END}\nMore.\n{demo}");
        let wanted = format!("# Kernels\n\n{load}\n{table}\n{END}\nMore.\n{demo}");
        assert_eq!(replaced(&text, "load", &table), Some(wanted));
        assert_eq!(replaced(&text, "tests", &table), None);
    }
}
