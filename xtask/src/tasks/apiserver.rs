//! The agent's tests against a real kube-apiserver, for which no package has one ready: it is built from Debian's source.

use std::path::PathBuf;

use anyhow::Result;

use super::command::{command, run, say, workspace};

/// Where the tests look for the folder of the programs.
const BINARIES: &str = "KIAM_TEST_APISERVER";

/// Builds the server where it is not there yet, and runs the tests.
pub(crate) fn run_tests() -> Result<()> {
    let folder = ensure()?;
    let mut tests = command("cargo");
    tests.args(["test", "-p", "kiam-agent", "--test", "apiserver"]).env(BINARIES, folder);
    run(&mut tests)
}

/// kube-apiserver, etcd, and a key for tokens: tools of this build, nothing of the machine is changed.
fn ensure() -> Result<PathBuf> {
    let folder = workspace().join("target/tools/kubernetes");
    if !folder.exists() {
        say("building kube-apiserver from Debian's source package (2 GB and some minutes, once)");
        run(command("xtask/apiserver/build.sh").arg(&folder))?;
    }
    Ok(folder)
}
