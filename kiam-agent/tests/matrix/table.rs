//! The matrix as text.

use std::{collections::BTreeMap, fmt};

use crate::{
    UPLINK,
    judge::{Closes, Outcome, State, Verdict},
    rows::Row,
};

/// What came of all rows in all states.
pub(crate) struct Table<'a> {
    title: &'a str,
    rows: &'a [Row],
    columns: BTreeMap<State, Column>,
}

enum Column {
    /// By row; `None` where the row does not apply.
    Played(Vec<Option<Outcome>>),
    LeftOut(&'static str),
}

// === impl Table ===

impl<'a> Table<'a> {
    pub(crate) fn new(title: &'a str, rows: &'a [Row]) -> Self {
        Self { title, rows, columns: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, state: State, cells: Vec<Option<Outcome>>) {
        assert_eq!(cells.len(), self.rows.len());
        self.columns.insert(state, Column::Played(cells));
    }

    pub(crate) fn leave_out(&mut self, state: State, reason: &'static str) {
        self.columns.insert(state, Column::LeftOut(reason));
    }

    /// The cells that are not as they must be, each with its row and state.
    pub(crate) fn wrong(&self) -> Vec<String> {
        let cells = self.columns.iter().flat_map(|(state, column)| {
            let cells = match column {
                Column::Played(cells) => cells.as_slice(),
                Column::LeftOut(_) => &[],
            };
            self.rows.iter().zip(cells).map(move |(row, cell)| (*state, row, cell))
        });
        let wrong = cells.filter_map(|(state, row, cell)| {
            let outcome = cell.as_ref()?;
            let wrong = row.judge(outcome, state) == Verdict::Wrong;
            wrong.then(|| format!("{}, {}: {outcome:?}", row.name, state.name()))
        });
        wrong.collect()
    }

    fn cell(&self, index: usize, state: State, column: &Column) -> String {
        let row = &self.rows[index];
        match column {
            Column::LeftOut(_) => "-".to_owned(),
            Column::Played(cells) => cells[index].as_ref().map_or("-".to_owned(), |outcome| {
                let mark = match row.judge(outcome, state) {
                    Verdict::Right => "",
                    Verdict::Tolerated => "~",
                    Verdict::Open => "o",
                    Verdict::Wrong => "!",
                };
                format!("{mark}{outcome}")
            }),
        }
    }
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
            for (state, column) in &self.columns {
                write!(f, "  {:14}", self.cell(index, *state, column))?;
            }
        }
        writeln!(f)?;
        for (state, column) in &self.columns {
            if let Column::LeftOut(reason) = column {
                writeln!(f, "{} is left out: {reason}", state.name())?;
            }
        }
        let open = self.rows.iter().filter(|row| row.closes == Closes::Never);
        let open: Vec<_> = open.map(|row| row.name.as_str()).collect();
        writeln!(f, "o: documented as open ({})", open.join("; "))?;
        if !UPLINK {
            writeln!(f, "~: tolerated, because UPLINK is off: this agent lacks that guard")?;
        }
        Ok(())
    }
}
