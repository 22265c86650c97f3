//! The table of `docs/clusters.md`.

use std::{fmt::Write as _, fs};

use anyhow::{Context, Result};

use crate::node_vm::Outcome;
use xtask::command::workspace;

const DOCUMENT: &str = "docs/clusters.md";
/// The table is between these lines.
const BEGIN: &str = "<!-- written by cargo xtask test cluster -->\n";
const END: &str = "<!-- end -->\n";

/// Writes what ran, and what came of it.
pub(super) fn write(versions: &[String], outcomes: &[Outcome]) -> Result<()> {
    let path = workspace().join(DOCUMENT);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {DOCUMENT}"))?;
    let text = replaced(&text, &table(versions, outcomes)?);
    let text = text.with_context(|| format!("{DOCUMENT} has no place for the table"))?;
    fs::write(&path, text).with_context(|| format!("writing {DOCUMENT}"))
}

/// The versions, and a line for each row.
pub(super) fn table(versions: &[String], outcomes: &[Outcome]) -> Result<String> {
    let mut text = String::new();
    for version in versions {
        writeln!(text, "- {version}").context("writing a line")?;
    }
    text += "\n| what | result | seen |\n| --- | --- | --- |\n";
    for Outcome { name, passed, said, .. } in outcomes {
        let result = if *passed { "passed" } else { "FAILED" };
        writeln!(text, "| {name} | {result} | {said} |").context("writing a line")?;
    }
    Ok(text)
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
    fn the_table_goes_between_its_lines() {
        let said = "0 of 5".to_owned();
        let outcome = Outcome { name: "reboot".into(), passed: true, seconds: 7, said };
        let made = table(&["Linux 6.12".into()], &[outcome]).unwrap();
        let text = format!("a\n{BEGIN}old\n{END}b\n");
        let wanted = format!(
            "a\n{BEGIN}\n- Linux 6.12\n\n| what | result | seen |\n| --- | --- | --- |\n\
             | reboot | passed | 0 of 5 |\n\n{END}b\n"
        );
        assert_eq!(replaced(&text, &made).unwrap(), wanted);
    }
}
