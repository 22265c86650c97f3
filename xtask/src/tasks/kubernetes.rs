//! Tests against Kubernetes itself, which no package has ready to run: it is built from Debian's packages of its source.
//!
//! What is built and downloaded is kept in `target/tools`; nothing of the machine is changed.

use std::path::PathBuf;

use anyhow::Result;

use xtask::build;
use xtask::command::{command, run, say, workspace};
use xtask::helm::{self, Helm};

/// Where the tests look for the folder of the programs.
const BINARIES: &str = "KIAM_TEST_APISERVER";

/// Runs the agent's tests against a real kube-apiserver and etcd.
pub(crate) fn test_agent() -> Result<()> {
    build::programs()?;
    let build = "xtask/apiserver/build.sh";
    let folder = tool("kubernetes", build, &["kube-apiserver"], "2 GB and some minutes")?;
    let mut tests = command("cargo");
    tests.args(["test", "-p", "kiam-agent", "--test", "apiserver"]).env(BINARIES, folder);
    tests.env(helm::VARIABLE, Helm::ensure()?);
    run(&mut tests)
}

/// Asks the API server's own plugin what the policies of `deploy/` allow.
pub(crate) fn test_policies() -> Result<()> {
    let folder =
        tool("kubernetes-source", "xtask/policies/fetch.sh", &[], "3 GB and some minutes")?;
    let mut tests = command(folder.join("usr/lib/go/bin/go"));
    tests
        .env("GOROOT", folder.join("usr/lib/go"))
        .env("GOPATH", folder.join("usr/share/gocode"))
        .env("GOCACHE", folder.join("cache"))
        .envs([("GO111MODULE", "off"), ("CGO_ENABLED", "0"), ("GOTOOLCHAIN", "local")])
        .current_dir(workspace().join("xtask/policies"))
        .args(["test", "-count=1", "policies_test.go"]);
    run(&mut tests)
}

/// The programs of a whole cluster.
pub(super) fn cluster_programs() -> Result<PathBuf> {
    let programs =
        ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"];
    tool("cluster", "xtask/apiserver/build.sh", &programs, "3 GB and ten minutes or more")
}

/// A folder of `target/tools`, which `script` makes where it is not there yet.
pub(super) fn tool(name: &str, script: &str, further: &[&str], cost: &str) -> Result<PathBuf> {
    let folder = workspace().join("target/tools").join(name);
    if !folder.exists() {
        say(format!("making {} from Debian's packages ({cost}, once)", folder.display()));
        run(command(script).arg(&folder).args(further))?;
    }
    Ok(folder)
}
