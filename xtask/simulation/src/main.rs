//! What a fleet of agents asks of STS and of the Kubernetes API: `cargo xtask simulate scale`.
//!
//! A crate of its own, so that it alone is compiled for speed.

#![forbid(unsafe_code)]

mod account;
mod document;
mod fleet;
mod kubernetes;
mod plan;
mod scenario;
mod tally;
#[cfg(test)]
mod tests;
mod world;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::Parser;

use crate::{fleet::Fleet, kubernetes::Sizes};

/// Simulates a fleet in virtual time and writes down what it asks for.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask simulate scale", bin_name = "cargo xtask simulate scale")]
struct Options {
    /// The same seed gives the same document.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Nodes, of 100 pods and 20 roles each.
    #[arg(long, value_name = "NUMBER", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(50..=50_000))]
    nodes: u32,
    /// Where to write the document instead.
    #[arg(long, value_name = "FILE", default_value = "docs/scale.md")]
    output: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let fleet = Fleet::of(options.nodes);
    let found = scenario::run_all(fleet, options.seed);
    let text = document::render(
        &fleet,
        options.seed,
        &found,
        &kubernetes::Load::of(&fleet, Sizes::assumed()),
    );
    fs::write(&options.output, &text)
        .with_context(|| format!("can't write {}", options.output.display()))?;
    eprintln!("{} is written", options.output.display());
    Ok(())
}
