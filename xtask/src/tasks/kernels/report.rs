//! The tables of `docs/kernels.md`.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::job::{FAILED, Report};

/// A table is between such a line, which names its check, and the next that ends one.
const BEGIN: &str = "<!-- written by cargo xtask test kernels --checks ";
const END: &str = "<!-- end -->\n";

/// Kernel by kernel, with what was on its command line, and row by row.
pub(super) fn table(columns: &[(&str, &Report)]) -> String {
    let line = |first: &str, cell: &dyn Fn(&(&str, &Report)) -> String| {
        let cells: Vec<String> = columns.iter().map(cell).collect();
        format!("| {first} | {} |\n", cells.join(" | "))
    };
    let mut table = line("kernel", &|(_, report)| format!("`{}`", report.release));
    table.push_str(&line("---", &|_| "---".to_owned()));
    table.push_str(&line("Debian's version", &|(_, report)| report.version.clone()));
    if columns.iter().any(|(parameters, _)| !parameters.is_empty()) {
        table.push_str(&line("command line", &|(parameters, _)| match *parameters {
            "" => "plain".to_owned(),
            parameters => format!("`{parameters}`"),
        }));
    }
    let mut rows: Vec<&str> = Vec::new();
    for (row, _) in columns.iter().flat_map(|(_, report)| &report.rows) {
        if !rows.contains(&row.as_str()) {
            rows.push(row);
        }
    }
    for row in rows {
        table.push_str(&line(&format!("`{row}`"), &|(_, report)| {
            let result = report.rows.iter().find(|(name, _)| name == row);
            result.map_or("not run", |(_, result)| short(result)).to_owned()
        }));
    }
    table
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
        assert!(plain.ends_with("| `defaults` | **FAILED** | loaded |\n"), "{plain}");
        assert!(!plain.contains("command line"), "{plain}");
        let table = table(&[("", &old), ("ipv6.disable=1", &new)]);
        assert!(table.contains("| command line | plain | `ipv6.disable=1` |\n"), "{table}");
        let (load, demo) = (format!("{BEGIN}load -->\n"), format!("{BEGIN}demo -->\nx\n{END}"));
        let text = format!("# Kernels\n\n{load}old\n{END}\nMore.\n{demo}");
        let wanted = format!("# Kernels\n\n{load}\n{table}\n{END}\nMore.\n{demo}");
        assert_eq!(replaced(&text, "load", &table), Some(wanted));
        assert_eq!(replaced(&text, "tests", &table), None);
    }
}
