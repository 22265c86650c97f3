//! `kubectl`, of the cluster's own version, as its administrator.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;
use xtask::command::printed;

/// Seconds after which it is ended, whatever it waits for.
const LIMIT: &str = "600";

/// The program and its configuration.
#[derive(Clone, Debug)]
pub(super) struct Kubectl {
    pub(super) program: PathBuf,
    pub(super) config: PathBuf,
}

// === impl Kubectl ===

impl Kubectl {
    /// What it prints for these words, which have no spaces, if it succeeds.
    pub(super) fn run(&self, words: &str) -> Result<String> {
        self.run_words(&words.split(' ').collect::<Vec<_>>())
    }

    /// The same for words that may have spaces.
    pub(super) fn run_words(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=1", LIMIT]).arg(&self.program);
        command.arg(format!("--kubeconfig={}", self.config.display())).args(words);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", "/nonexistent");
        printed(&mut command).with_context(|| format!("kubectl {}", words.join(" ")))
    }

    /// The objects that it gets.
    pub(super) fn get(&self, words: &str) -> Result<Value> {
        let text = self.run(&format!("get --output=json {words}"))?;
        serde_json::from_str(&text).context("reading what kubectl got")
    }
}
