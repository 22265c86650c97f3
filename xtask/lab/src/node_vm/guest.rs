//! What runs on the node: one life of it, row by row.

use std::{fs, fs::OpenOptions, io::Write as _, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use tokio::time::Instant;

use super::{
    Life, Outcome,
    machine::{END, LIFE, REPORT},
    power, rows,
    stage::Stage,
};

/// The folder that is shared with the machine.
const SHARED: &str = "/lab";

/// Letters of an error that are reported; the rest is in the shared folder's log.
const LONGEST: usize = 500;

/// In the shared folder: parts of the names of the rows to play.
pub(super) const CHOSEN: &str = "rows";

/// One thing that is tried; what it counted.
pub(super) type Row = (&'static str, fn(&mut Stage) -> Result<String>);

/// Lives the life that the shared folder names, reports each row, and waits for the loss of power.
pub(crate) fn main() -> Result<()> {
    let life = fs::read_to_string(Path::new(SHARED).join(LIFE)).context("asking for the life")?;
    let life = Life::named(&life)?;
    let rows: &[Row] = match life {
        Life::Work => &rows::ALL,
        Life::Unguarded => &power::UNGUARDED,
        Life::Guarded => &power::GUARDED,
    };
    let words = fs::read_to_string(Path::new(SHARED).join(CHOSEN));
    let words = words.context("asking for the rows")?;
    let words: Vec<&str> = words.trim().split(',').collect();
    match Stage::set() {
        Ok(mut stage) => {
            for (number, row) in rows.iter().enumerate() {
                // Others build on the first of a life's rows, and in lives of early pods each on the one before.
                let needed = number == 0 || life != Life::Work;
                if !needed && !words.iter().any(|word| row.0.contains(word)) {
                    continue;
                }
                report(&run(&mut stage, row).to_string())?;
            }
        }
        Err(error) => report(&format!("the stage is not set: {error:#}"))?,
    }
    // What is written survives then.
    rustix::fs::sync();
    report(END)?;
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn run(stage: &mut Stage, (name, row): &Row) -> Outcome {
    let begun = Instant::now();
    let result = row(stage);
    let seconds = begun.elapsed().as_secs();
    let passed = result.is_ok();
    let said = result.unwrap_or_else(|error| {
        let whole = format!("{error:#}");
        eprintln!("{name}: {whole}");
        whole.chars().take(LONGEST).collect()
    });
    Outcome { name: (*name).to_owned(), passed, seconds, said }
}

fn report(line: &str) -> Result<()> {
    let report = OpenOptions::new().append(true).open(Path::new(SHARED).join(REPORT));
    let mut report = report.context("opening the report")?;
    writeln!(report, "{line}").context("reporting")
}
