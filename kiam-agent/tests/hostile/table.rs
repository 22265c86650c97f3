//! The rows as text.

use std::fmt;

use crate::judge::Outcome;

/// What came of all rows of a configuration.
pub(crate) struct Table {
    title: &'static str,
    rows: Vec<(&'static str, Outcome)>,
}

// === impl Table ===

impl Table {
    pub(crate) fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, name: &'static str, outcome: Outcome) {
        self.rows.push((name, outcome));
    }

    /// Each row that is not as it must be, with its faults.
    pub(crate) fn wrong(&self) -> Vec<String> {
        let rows = self.rows.iter().map(|(name, outcome)| (name, outcome.faults()));
        rows.filter(|(_, faults)| !faults.is_empty())
            .map(|(name, faults)| format!("{name}: {}", faults.join("; ")))
            .collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        writeln!(f, "\n=== Hostile neighbours, {}", self.title)?;
        writeln!(
            f,
            "{:width$}  {:>5} {:>5} {:>6} {:>15} {:>15} {:>6} {:>5} {:>11} {:>5} {:>5}",
            "", "", "", "", "control, ms", "attacked, ms", "lease", "agent", "CPU, s", "", "log"
        )?;
        writeln!(
            f,
            "{:width$}  {:>5} {:>5} {:>6} {:>7} {:>7} {:>7} {:>7} {:>6} {:>5} {:>5} {:>5} {:>5} {:>5}",
            "attack",
            "asked",
            "wrong",
            "failed",
            "p50",
            "p99",
            "p50",
            "p99",
            "lapses",
            "MiB",
            "agent",
            "att.",
            "ratio",
            "KiB"
        )?;
        for (name, outcome) in &self.rows {
            let mark = if outcome.faults().is_empty() { "" } else { "  FAILED" };
            writeln!(f, "{name:width$}  {outcome}{mark}")?;
        }
        for (name, outcome) in &self.rows {
            let replaced = [&outcome.control, &outcome.attacked].map(|measured| measured.replaced);
            let replaced = match replaced {
                [Some(usual), Some(took)] => {
                    vec![format!("ready in {took:.1?}, usually {usual:.1?}")]
                }
                _ => Vec::new(),
            };
            let said = [outcome.faults(), replaced, outcome.notes.clone()].concat().join("; ");
            if !said.is_empty() {
                writeln!(f, "{name}: {said}")?;
            }
        }
        Ok(())
    }
}
