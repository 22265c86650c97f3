//! Tells the agent which commit it was built from.

use std::{env, process::Command};

fn main() {
    println!("cargo::rerun-if-env-changed=KIAM_COMMIT");
    println!("cargo::rerun-if-changed=../.git/logs/HEAD");
    println!("cargo::rustc-env=KIAM_COMMIT={}", commit());
}

fn commit() -> String {
    let given = env::var("KIAM_COMMIT").ok();
    given.or_else(git).unwrap_or_else(|| "unknown".to_owned())
}

fn git() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
