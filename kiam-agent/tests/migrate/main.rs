//! `kiam-agent migrate`, the real binary over manifests that are shaped as public ones are.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod accepted;
mod cluster;
mod documents;
mod installations;
mod refused;
mod rules;
mod strangers;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");

/// The folder of the manifests.
fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/migrate/data")
}

/// The command, started in the folder of the manifests and with an empty environment.
fn command(words: &[&str]) -> Command {
    let mut command = Command::new(AGENT);
    command.arg("migrate").args(words).current_dir(data()).env_clear().stdin(Stdio::null());
    command
}

fn run(words: &[&str]) -> Output {
    command(words).output().unwrap()
}

/// What the command prints, and its exit status.
fn printed(words: &[&str]) -> (String, i32) {
    let output = run(words);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(errors, "", "{words:?}");
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

/// The error of a command that fails with `status`.
fn error(words: &[&str], status: i32) -> String {
    let output = run(words);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{words:?}: {errors}");
    assert_eq!(output.stdout, b"", "{words:?}");
    errors
}

/// The flags of `--output=flags`.
fn flags(text: &str) -> Vec<&str> {
    text.lines().take_while(|line| !line.starts_with('#')).collect()
}
