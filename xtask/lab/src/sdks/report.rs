//! The table of `docs/clients.md`.

use std::time::Duration;

use anyhow::Result;

use super::home::Homes;
use super::play::{Played, seconds};
use super::rows::{Region, Row, Tokens};
use xtask::page;

const HEAD: [&str; 8] = [
    "client",
    "version",
    "session tokens",
    "finds the region",
    "first, pod-local",
    "first, node",
    "gives up: role denied",
    "gives up: no role",
];

/// Writes the table of all that was played.
pub(super) fn write(rows: &[&Row], homes: &Homes, played: &[Played]) -> Result<()> {
    let lines = rows.iter().map(|row| Ok(line(row, homes.version(row)?, played)));
    let table = page::table(&HEAD, 0..4, lines.collect::<Result<Vec<_>>>()?);
    page::write("docs/clients.md", "cargo xtask test sdks", &table)
}

fn line(row: &Row, version: String, played: &[Played]) -> Vec<String> {
    let of_row = || played.iter().filter(|one| one.client == row.name);
    let first = |path: &str| {
        let one = of_row().find(|one| one.combination.path == path && one.first.is_some());
        seconds(one.and_then(|one| one.first))
    };
    let longest = |time: fn(&Played) -> Option<Duration>| seconds(of_row().filter_map(time).max());
    let name = match row.by {
        "" => row.name.to_owned(),
        by => format!("{} ({by})", row.name),
    };
    let tokens = match row.tokens {
        Tokens::Yes => "yes",
        Tokens::Never => "no",
    };
    let region = match row.region {
        Region::Finds => "yes",
        Region::Given => "not asked to",
    };
    let (local, node) = (first("pod-local"), first("node"));
    let (denied, without) = (longest(|one| one.denied), longest(|one| one.without));
    vec![name, version, tokens.to_owned(), region.to_owned(), local, node, denied, without]
}
