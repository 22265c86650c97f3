//! The table of `docs/kernels.md`.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::guest::Outcome;

/// The table is between these lines.
const BEGIN: &str = "<!-- written by cargo xtask test kernels -->\n";
const END: &str = "<!-- end -->\n";

/// Kernel by kernel, set by set.
pub(super) fn table(outcomes: &[Outcome]) -> String {
    let row = |first: &str, cell: &dyn Fn(&Outcome) -> String| {
        let cells: Vec<String> = outcomes.iter().map(cell).collect();
        format!("| {first} | {} |\n", cells.join(" | "))
    };
    let mut table = row("set of constants", &|outcome| format!("`{}`", outcome.release));
    table.push_str(&row("---", &|_| "---".to_owned()));
    table.push_str(&row("Debian's version", &|outcome| outcome.version.clone()));
    let mut sets: Vec<&str> = Vec::new();
    for (set, _) in outcomes.iter().flat_map(|outcome| &outcome.sets) {
        if !sets.contains(&set.as_str()) {
            sets.push(set);
        }
    }
    for set in sets {
        table.push_str(&row(&format!("`{set}`"), &|outcome| {
            let result = outcome.sets.iter().find(|(name, _)| name == set);
            result.map_or("not run", |(_, result)| short(result)).to_owned()
        }));
    }
    table
}

/// A failure has a verifier's log, which is no phrase.
fn short(result: &str) -> &str {
    if result.starts_with("FAILED") { "**FAILED**" } else { result }
}

/// Puts the table in its place in `document`.
pub(super) fn write(document: &Path, table: &str) -> Result<()> {
    let shown = document.display();
    let text = fs::read_to_string(document).with_context(|| format!("reading {shown}"))?;
    let text = replaced(&text, table).with_context(|| format!("{shown} has no place for it"))?;
    fs::write(document, text).with_context(|| format!("writing {shown}"))
}

fn replaced(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_the_place_of_the_one_before_it_and_shows_no_logs() {
        let set = |result: &str| vec![("defaults".to_owned(), result.to_owned())];
        let outcome = |release: &str, result| Outcome {
            release: release.to_owned(),
            version: "1".to_owned(),
            sets: set(result),
            ..Outcome::default()
        };
        let table = table(&[outcome("5.10", "FAILED: a | log"), outcome("6.1", "loaded")]);
        assert!(table.ends_with("| `defaults` | **FAILED** | loaded |\n"), "{table}");
        let text = format!("# Kernels\n\n{BEGIN}old\n{END}\nMore.\n");
        let wanted = format!("# Kernels\n\n{BEGIN}\n{table}\n{END}\nMore.\n");
        assert_eq!(replaced(&text, &table), Some(wanted));
        assert_eq!(replaced("# Kernels\n", &table), None);
    }
}
