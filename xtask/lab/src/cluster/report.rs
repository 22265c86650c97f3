//! The table of `docs/clusters.md`.

use anyhow::Result;

use crate::node_vm::Outcome;
use xtask::page;

/// Writes what ran, and what came of it.
pub(super) fn write(versions: &[String], outcomes: &[Outcome]) -> Result<()> {
    let table = table(versions, outcomes);
    page::write("docs/clusters.md", "cargo xtask test cluster", &table)
}

/// The versions, and a line for each row.
pub(super) fn table(versions: &[String], outcomes: &[Outcome]) -> String {
    let versions: String = versions.iter().map(|version| format!("- {version}\n")).collect();
    let row = |outcome: &Outcome| {
        let result = if outcome.passed { "passed" } else { "FAILED" };
        vec![outcome.name.clone(), result.to_owned(), outcome.said.clone()]
    };
    let table = page::table(&["what", "result", "seen"], 0..3, outcomes.iter().map(row));
    format!("{versions}\n{table}")
}
