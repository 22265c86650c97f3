//! The table of `docs/clients.md`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::home::Homes;
use super::play::{Played, seconds};
use super::rows::{Region, Row, Tokens};
use xtask::command::workspace;

const DOCUMENT: &str = "docs/clients.md";
/// The table is between these lines.
const BEGIN: &str = "<!-- written by cargo xtask test sdks -->\n";
const END: &str = "<!-- end -->\n";

/// Writes the table of all that was played.
pub(super) fn write(rows: &[&Row], homes: &Homes, played: &[Played]) -> Result<()> {
    let lines = rows.iter().map(|row| Ok(line(row, &homes.version(row)?, played)));
    let table = lines.collect::<Result<String>>()?;
    let path = workspace().join(DOCUMENT);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {DOCUMENT}"))?;
    let text = replaced(&text, &format!("{HEAD}{table}"));
    let text = text.with_context(|| format!("{DOCUMENT} has no place for the table"))?;
    fs::write(&path, text).with_context(|| format!("writing {DOCUMENT}"))
}

const HEAD: &str = "\
| client | version | session tokens | finds the region | first, pod-local | first, node | gives up: role denied | gives up: no role |
| --- | --- | --- | --- | --: | --: | --: | --: |
";

fn line(row: &Row, version: &str, played: &[Played]) -> String {
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
    format!(
        "| {name} | {version} | {tokens} | {region} | {local} | {node} | {denied} | {without} |\n"
    )
}

fn replaced(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}
