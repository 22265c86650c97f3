//! The table of `docs/clusters.md`.

use anyhow::Result;

use crate::node_vm::{self, Outcome};
use xtask::page;

/// Writes what ran, and what came of it.
pub(super) fn write(versions: &[String], outcomes: &[Outcome]) -> Result<()> {
    let table = table(versions, outcomes);
    page::write("docs/clusters.md", "cargo xtask test cluster", &table)
}

/// The versions, and a line for each row.
pub(super) fn table(versions: &[String], outcomes: &[Outcome]) -> String {
    let versions: String = versions.iter().map(|version| format!("- {version}\n")).collect();
    format!("{versions}\n{}", node_vm::table(outcomes))
}
