//! Hostile neighbours: what one pod does at full speed, and what another notices of it. Each row is an attack beside a
//! victim that asks as an SDK does, and the same without the attack before it.
//! `cargo test -p kiam-agent --test hostile -- --nocapture` prints a table for each configuration.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod agent;
mod flows;
mod judge;
mod rows;
mod stage;
mod storms;
mod table;

use std::{
    env,
    sync::{Mutex, PoisonError},
};

use lab::skip;

use crate::{rows::Row, stage::Stage, table::Table};

/// Serializes the configurations: they measure time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// How often a row is played when the victim was slow and nothing else was wrong: the machine may have been busy.
const TRIES: u32 = 3;

/// The variable that names the rows to play, by a part of their names; without it, all are.
const ONLY: &str = "KIAM_HOSTILE_ROWS";

/// A configuration of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Configuration {
    Default,
    NodePath,
    HostNetwork,
}

#[test]
fn no_pod_troubles_another_in_the_default_configuration() {
    play("no_pod_troubles_another_in_the_default_configuration", Configuration::Default);
}

#[test]
fn no_pod_troubles_another_on_the_nodes_path() {
    play("no_pod_troubles_another_on_the_nodes_path", Configuration::NodePath);
}

#[test]
fn no_pod_troubles_another_on_the_hosts_network() {
    play("no_pod_troubles_another_on_the_hosts_network", Configuration::HostNetwork);
}

/// Plays all rows of a configuration, prints the table, and fails for each that is not as it must be.
fn play(test: &str, configuration: Configuration) {
    if skip(test) {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut stage = Stage::set(configuration);
    let mut table = Table::new(configuration.title());
    let only = env::var(ONLY).unwrap_or_default();
    for row in Row::of(&stage).into_iter().filter(|row| row.name.contains(&only)) {
        println!("{}: {}", configuration.title(), row.name);
        let mut outcome = stage.play(&row);
        for _ in 1..TRIES {
            if !outcome.is_only_slow() {
                break;
            }
            println!("again, as it was slow: {}: {:?}", row.name, outcome.faults());
            outcome = stage.play(&row);
        }
        table.add(row.name, outcome);
    }
    println!("{table}");
    let wrong = table.wrong();
    assert!(wrong.is_empty(), "{} rows are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

// === impl Configuration ===

impl Configuration {
    fn title(self) -> &'static str {
        match self {
            Self::Default => "the default configuration",
            Self::NodePath => "--path=node",
            Self::HostNetwork => "--host-network-pods=intercept",
        }
    }

    pub(crate) fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Default => &["--level=info", "--metrics=10.77.0.1:9620"],
            Self::NodePath => &["--level=info", "--path=node"],
            Self::HostNetwork => &["--level=info", "--host-network-pods=intercept"],
        }
    }
}
