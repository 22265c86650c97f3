//! Aligned tables that fit the terminal, with notes below a row.

use std::{fmt, io::IsTerminal as _};

use rustix::termios::tcgetwinsize;

use super::cli::Colors;
use crate::printable::printable;

/// The spaces between two columns.
const GAP: usize = 2;
/// The indent of a note.
const INDENT: usize = 4;
/// The fewest characters that a column is cut to.
const NARROWEST: usize = 8;
/// The fewest columns of a terminal that are believed.
const SMALLEST: usize = 40;

/// How something is meant, which its colour shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Tone {
    #[default]
    Plain,
    Good,
    Warn,
    Bad,
    Faint,
}

/// A cell of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    text: String,
    tone: Tone,
}

/// A column. Those with the highest rank are left out first where there is no room; those of rank 0 never.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    pub(super) rank: u8,
}

/// A row, with what is said about it.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) cells: Vec<Cell>,
    pub(super) notes: Vec<Cell>,
}

/// A table.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Row>,
}

/// What text is written to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    /// The columns of a terminal; elsewhere lines may have any length.
    pub(super) width: Option<usize>,
    pub(super) colors: bool,
}

// === impl Screen ===

impl Screen {
    /// Standard output.
    pub(super) fn stdout(colors: Colors) -> Self {
        let stdout = std::io::stdout();
        let is_terminal = stdout.is_terminal();
        let width = tcgetwinsize(&stdout).ok().map(|size| usize::from(size.ws_col));
        let width = width.filter(|width| is_terminal && *width > 0);
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let is_plain = set("NO_COLOR").is_some() || set("TERM").is_some_and(|it| it == "dumb");
        let colors = match colors {
            Colors::Auto => is_terminal && !is_plain,
            Colors::Always => true,
            Colors::Never => false,
        };
        Self { width: width.map(|width| width.max(SMALLEST)), colors }
    }

    /// `text` in the colour of its tone.
    pub(super) fn painted(self, text: &str, tone: Tone) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Faint => "2",
            Tone::Plain => return text.to_owned(),
        };
        if self.colors && !text.is_empty() {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }

    /// `text` in lines that fit, indented by `indent`.
    pub(super) fn wrapped(self, text: &str, indent: usize) -> Vec<String> {
        let Some(width) = self.width else { return vec![text.to_owned()] };
        let room = width.saturating_sub(indent).max(NARROWEST);
        let mut lines = vec![String::new()];
        for word in text.split(' ') {
            let mut word: Vec<char> = word.chars().collect();
            let line = lines.last_mut().expect("there is a line");
            let used = line.chars().count();
            if used > 0 && used + 1 + word.len() <= room {
                line.push(' ');
                line.extend(&word);
                continue;
            }
            // A word that is longer than a line, such as an ARN, goes on in the next ones.
            if used > 0 {
                lines.push(String::new());
            }
            while word.len() > room {
                let rest = word.split_off(room);
                lines.last_mut().expect("there is a line").extend(&word);
                lines.push(String::new());
                word = rest;
            }
            lines.last_mut().expect("there is a line").extend(&word);
        }
        lines
    }
}

// === impl Cell ===

impl Cell {
    /// Text that others may have written.
    pub(super) fn new(text: impl AsRef<str>, tone: Tone) -> Self {
        Self { text: printable(text.as_ref()), tone }
    }

    /// As [`Cell::new`], in the usual colour.
    pub(super) fn plain(text: impl AsRef<str>) -> Self {
        Self::new(text, Tone::Plain)
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }

    /// The text in `width` characters.
    fn cut(&self, width: usize) -> String {
        if self.width() <= width {
            return self.text.clone();
        }
        let kept: String = self.text.chars().take(width.saturating_sub(1)).collect();
        kept + "…"
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

// === impl Row ===

impl Row {
    /// Adds what is said about it.
    pub(super) fn note(&mut self, text: impl AsRef<str>, tone: Tone) {
        self.notes.push(Cell::new(text, tone));
    }
}

// === impl Table ===

impl Table {
    /// The table in text.
    pub(super) fn text(&self, screen: Screen) -> String {
        let shown = self.fitting(screen.width);
        let mut text = String::new();
        let titles: Vec<Cell> =
            self.columns.iter().map(|column| Cell::new(column.title, Tone::Faint)).collect();
        line(&mut text, &titles, &shown, screen);
        for row in &self.rows {
            line(&mut text, &row.cells, &shown, screen);
            for note in &row.notes {
                for part in screen.wrapped(&note.text, INDENT) {
                    text += &" ".repeat(INDENT);
                    text += &screen.painted(&part, note.tone);
                    text.push('\n');
                }
            }
        }
        text
    }

    /// The columns that are shown, with their widths.
    fn fitting(&self, width: Option<usize>) -> Vec<(usize, usize)> {
        let natural = |at: usize| {
            let cells = self.rows.iter().filter_map(|row| row.cells.get(at));
            let title = self.columns[at].title.chars().count();
            cells.map(Cell::width).fold(title, usize::max)
        };
        let mut shown: Vec<_> = (0..self.columns.len()).map(|at| (at, natural(at))).collect();
        let Some(width) = width else { return shown };
        let total = |shown: &[(usize, usize)]| {
            shown.iter().map(|(_, width)| width + GAP).sum::<usize>().saturating_sub(GAP)
        };
        while total(&shown) > width {
            let droppable = shown.iter().filter(|(at, _)| self.columns[*at].rank > 0);
            let Some((dropped, _)) = droppable.max_by_key(|(at, _)| self.columns[*at].rank) else {
                break;
            };
            let dropped = *dropped;
            shown.retain(|(at, _)| *at != dropped);
        }
        while total(&shown) > width {
            let widest = shown.iter_mut().max_by_key(|(_, width)| *width);
            match widest {
                Some((_, wide)) if *wide > NARROWEST => *wide -= 1,
                _ => break,
            }
        }
        shown
    }
}

fn line(text: &mut String, cells: &[Cell], shown: &[(usize, usize)], screen: Screen) {
    let empty = Cell::default();
    let last = shown.len().saturating_sub(1);
    for (number, (at, width)) in shown.iter().enumerate() {
        let cell = cells.get(*at).unwrap_or(&empty);
        let cut = cell.cut(*width);
        let used = cut.chars().count();
        *text += &screen.painted(&cut, cell.tone);
        if number < last {
            *text += &" ".repeat(width - used + GAP);
        }
    }
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let columns = [("NODE", 0), ("STATE", 0), ("PODS", 2), ("VERSION", 9)];
        let columns = columns.map(|(title, rank)| Column { title, rank });
        let row =
            |cells: [&str; 4]| Row { cells: cells.map(Cell::plain).to_vec(), notes: Vec::new() };
        let mut bad = row(["n2.\u{1b}[2Jinternal", "no agent", "", ""]);
        bad.note("the node has a taint that the agent's DaemonSet does not tolerate", Tone::Bad);
        Table {
            columns: columns.to_vec(),
            rows: vec![row(["n1", "ok", "12/40", "0.1.0 (commit abcdef0)"]), bad],
        }
    }

    #[test]
    fn columns_are_left_out_by_rank_and_then_cut_until_the_table_fits() {
        for width in [40, 41, 50, 60, 80, 200] {
            let text = table().text(Screen { width: Some(width), colors: false });
            assert!(text.lines().all(|line| line.chars().count() <= width), "{width}:\n{text}");
            assert_eq!(text.contains("VERSION"), width >= 60, "{width}:\n{text}");
            assert!(text.contains("NODE") && text.contains("STATE"), "{text}");
        }
        let text = table().text(Screen { width: None, colors: false });
        let expected = "\
NODE             STATE     PODS   VERSION
n1               ok        12/40  0.1.0 (commit abcdef0)
n2.\u{fffd}[2Jinternal  no agent
    the node has a taint that the agent's DaemonSet does not tolerate
";
        assert_eq!(text, expected);
        let one = Table { columns: table().columns[..1].to_vec(), rows: table().rows };
        let text = one.text(Screen { width: Some(10), colors: false });
        assert!(text.contains("n2.\u{fffd}[2Jin…\n"), "{text}");
    }

    #[test]
    fn a_long_word_goes_on_in_the_next_line() {
        let screen = Screen { width: Some(20), colors: false };
        assert_eq!(
            screen.wrapped("ab arn:aws:iam::123456789012", 4),
            ["ab", "arn:aws:iam::123", "456789012"]
        );
    }

    #[test]
    fn colours_are_around_words_and_nothing_else() {
        let colors = Screen { width: Some(80), colors: true };
        assert_eq!(colors.painted("ok", Tone::Good), "\u{1b}[32mok\u{1b}[0m");
        assert_eq!(colors.painted("", Tone::Good), "");
        let plain = Screen { colors: false, ..colors };
        assert_eq!(plain.painted("ok", Tone::Good), "ok");
    }
}
