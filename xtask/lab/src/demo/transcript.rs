//! Plain, aligned text in which every line is a claim with its check. At most 100 columns.

use std::{fmt::Display, io::IsTerminal};

const GREEN: &str = "\x1b[32m";
const RED: &str = "\x1b[1;31m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";
/// What a line has before its mark.
const WIDTH: usize = 92;

/// What was claimed so far.
#[derive(Debug)]
pub(super) struct Transcript {
    coloured: bool,
    sections: u32,
    held: u32,
    broken: Vec<String>,
}

// === impl Transcript ===

impl Transcript {
    pub(super) fn new() -> Self {
        Self { coloured: std::io::stdout().is_terminal(), sections: 0, held: 0, broken: Vec::new() }
    }

    /// Says something that needs no check.
    pub(super) fn say(&self, text: impl Display) {
        println!("   {text}");
    }

    /// Begins a numbered section.
    pub(super) fn section(&mut self, title: &str) {
        self.sections += 1;
        println!("\n{}", self.paint(BOLD, &format!("{}. {title}", self.sections)));
    }

    /// Shows `line` with its mark: whether `checks` all hold. Those that don't are named below it.
    pub(super) fn claim(&mut self, line: impl Display, checks: &[(&str, bool)]) {
        let line = line.to_string();
        let broken: Vec<&str> =
            checks.iter().filter(|check| !check.1).map(|check| check.0).collect();
        let mark =
            if broken.is_empty() { self.paint(GREEN, "ok") } else { self.paint(RED, "FALSE") };
        println!("   {line:<WIDTH$}{mark}");
        for check in broken {
            println!("      {}", self.paint(RED, &format!("not so: {check}")));
            let line: Vec<&str> = line.split_whitespace().collect();
            self.broken.push(format!("{}. {}: not so: {check}", self.sections, line.join(" ")));
        }
        self.held += u32::try_from(checks.iter().filter(|check| check.1).count()).unwrap_or(0);
    }

    /// How many checks held, and those that did not.
    pub(super) fn result(&self) -> (u32, &[String]) {
        (self.held, &self.broken)
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.coloured { format!("{colour}{text}{PLAIN}") } else { text.to_owned() }
    }
}
