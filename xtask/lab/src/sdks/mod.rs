//! Many real AWS clients, old and new, in the lab's pods: each finds its pod's role by every path and with tokens required
//! or not, finds the region by itself where it can, and gives up soon where AWS denies the role.
//!
//! Who a client is, is what signed its first request to an AWS service: the fake one checks the signature.

mod home;
mod play;
mod report;
mod rows;
mod stage;

use std::env;

use anyhow::{Result, bail};

use self::home::Homes;
use self::play::Played;
use self::rows::{ROWS, Row};
use self::stage::{COMBINATIONS, Stage};
use xtask::command::say;

/// Runs the rows with one of these, between commas, in their names; without it, all.
const CHOSEN: &str = "KIAM_SDK_ROWS";

/// Runs the clients; without root there is no node to run them on. All of them together also write `docs/clients.md`.
pub(crate) fn run(no_skip: bool) -> Result<()> {
    if let Err(reason) = lab::available() {
        if no_skip {
            bail!("the clients can't run: {reason}");
        }
        say(format!("skipped: real clients: {reason}"));
        return Ok(());
    }
    let chosen = env::var(CHOSEN).unwrap_or_default();
    let rows: Vec<&Row> =
        ROWS.iter().filter(|row| chosen.split(',').any(|part| row.name.contains(part))).collect();
    if rows.is_empty() {
        bail!("{CHOSEN}={chosen:?}: no client has that in its name");
    }
    let homes = Homes::ensure(&rows)?;
    let mut played = Vec::new();
    for combination in COMBINATIONS {
        let stage = Stage::start(combination)?;
        for row in &rows {
            let one = stage.play(row, &homes)?;
            say(one.to_string());
            one.faults().for_each(say);
            played.push(one);
        }
        stage.finish()?;
    }
    let faults: Vec<String> = played.iter().flat_map(Played::faults).collect();
    if !faults.is_empty() {
        bail!("{} of {} runs fell short:\n{}", faults.len(), played.len(), faults.join("\n"));
    }
    if chosen.is_empty() {
        report::write(&rows, &homes, &played)?;
    }
    Ok(())
}
