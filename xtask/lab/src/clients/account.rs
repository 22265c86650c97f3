//! An AWS account in a moto server that checks signatures: who is who is what its own records say.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{NODE_V4, Node, Process, loopback};
use serde::Deserialize;

use super::program;
use xtask::command::{printed, workspace};

const PORT: u16 = 5000;
/// How long it may take to start.
const LIMIT: Duration = Duration::from_secs(60);

/// The server, at the node's address, where the pods reach it too.
#[derive(Debug)]
pub(super) struct Account<'a> {
    _moto: Process,
    node: &'a Node,
}

/// The credentials that the node's own metadata service gives out.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NodeCredentials {
    pub(super) access_key_id: String,
    pub(super) secret_access_key: String,
    pub(super) session_token: String,
}

/// What one access key was issued for.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    /// The role's ARN.
    pub(super) role: String,
    /// The session's, as `GetCallerIdentity` says it.
    pub(super) arn: String,
}

// === impl Account ===

impl<'a> Account<'a> {
    /// Starts it with these roles, which the node may assume; from then on it knows nobody but the node.
    pub(super) fn open(node: &'a Node, roles: &[&str]) -> Result<(Self, NodeCredentials)> {
        let mut command = node.command(program("moto_server"))?;
        command.args(["-H", &NODE_V4.to_string(), "-p", &PORT.to_string()]);
        let mut moto = Process::start("moto", &mut command, node.folder().join("moto.log"))?;
        let asked = || loopback::get(address(), "/moto-api/data.json");
        moto.wait(
            "answered",
            LIMIT,
            |_| matches!(node.netns().enter(asked), Ok(Ok(reply)) if reply.status == 200),
        )?;
        let account = Self { _moto: moto, node };
        let credentials = account.ask(&[&["set-up"], roles].concat())?;
        Ok((account, serde_json::from_str(&credentials).context("reading the node's credentials")?))
    }

    /// The endpoint of its STS.
    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", address())
    }

    /// Whose each access key is.
    pub(super) fn records(&self) -> Result<BTreeMap<String, Record>> {
        serde_json::from_str(&self.ask(&["records"])?).context("reading moto's records")
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.node.command(program("python"))?;
        command.arg(workspace().join("xtask/lab/acceptance/account.py")).arg(self.endpoint());
        printed(command.args(arguments))
    }
}

fn address() -> SocketAddr {
    (NODE_V4, PORT).into()
}
