//! The matrix as text.

use std::{collections::BTreeMap, fmt};

use crate::{
    judge::{Outcome, State, Verdict},
    rows::Row,
};

/// What came of all rows in all states.
pub(crate) struct Table<'a> {
    title: &'a str,
    rows: &'a [Row],
    /// By row; `None` where the row does not apply.
    columns: BTreeMap<State, Vec<Option<Outcome>>>,
}

// === impl Table ===

impl<'a> Table<'a> {
    pub(crate) fn new(title: &'a str, rows: &'a [Row]) -> Self {
        Self { title, rows, columns: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, state: State, cells: Vec<Option<Outcome>>) {
        assert_eq!(cells.len(), self.rows.len());
        self.columns.insert(state, cells);
    }

    /// The cells that are not as they must be, each with its row and state.
    pub(crate) fn wrong(&self) -> Vec<String> {
        let cells = self.columns.iter().flat_map(|(state, cells)| {
            self.rows.iter().zip(cells).map(move |(row, cell)| (*state, row, cell))
        });
        let wrong = cells.filter_map(|(state, row, cell)| {
            let outcome = cell.as_ref()?;
            let wrong = row.judge(outcome, state) == Verdict::Wrong;
            wrong.then(|| format!("{}, {}: {outcome:?}", row.name, state.name()))
        });
        wrong.collect()
    }
}

fn text(row: &Row, state: State, cell: Option<&Outcome>) -> String {
    let Some(outcome) = cell else { return "-".to_owned() };
    let mark = match row.judge(outcome, state) {
        Verdict::Right => "",
        Verdict::Open => "o",
        Verdict::Wrong => "!",
    };
    format!("{mark}{outcome}")
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n=== What {} try: the answer, and +packets at the metadata service",
            self.title
        )?;
        let names = self.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
        write!(f, "{:names$}", "")?;
        for state in self.columns.keys() {
            write!(f, "  {:14}", state.name())?;
        }
        for (index, row) in self.rows.iter().enumerate() {
            write!(f, "\n{:names$}", row.name)?;
            for (state, cells) in &self.columns {
                write!(f, "  {:14}", text(row, *state, cells[index].as_ref()))?;
            }
        }
        let open = self.rows.iter().filter(|row| row.open);
        let open: Vec<_> = open.map(|row| row.name.as_str()).collect();
        writeln!(f, "\no: documented as open ({})", open.join("; "))
    }
}
