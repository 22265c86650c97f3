//! Containers that commands run in, and their logs: `pods/exec` and `pods/log`, as API servers and kubelets speak them.
//!
//! A command is a real process. What it has of its container is the container's environment, and that the container's
//! programs are found by their names.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{ExitStatus, Stdio},
};

use anyhow::{Context as _, Result};
use futures::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, Response, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Command,
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::{
    api::{Refusal, bad_request},
    resource::Resource,
    store::Store,
};
use crate::fake::{
    fault::Call,
    http::{Body, full},
};

/// The channels of a command, as their frames' first bytes.
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
/// How much of an output is in a frame at most.
const FRAME: usize = 16 << 10;

/// A container of a pod.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// The programs that it has, by the names that commands call them by.
    pub programs: BTreeMap<String, PathBuf>,
    /// The environment of commands.
    pub environment: Vec<(String, String)>,
    /// Its log.
    pub log: PathBuf,
    /// The log of its former life, if it has one.
    pub former_log: Option<PathBuf>,
}

/// Of which version the server speaks the protocol of commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExecProtocol {
    /// `v4.channel.k8s.io`, all that servers before Kubernetes 1.30 speak.
    V4,
    /// `v5.channel.k8s.io`, too.
    #[default]
    V5,
}

// === impl ExecProtocol ===

impl ExecProtocol {
    /// The first one of the client's that the server speaks.
    fn chosen(self, offered: &str) -> Option<&'static str> {
        let spoken: &[&str] = match self {
            Self::V4 => &["v4.channel.k8s.io"],
            Self::V5 => &["v5.channel.k8s.io", "v4.channel.k8s.io"],
        };
        offered
            .split(',')
            .find_map(|offer| spoken.iter().find(|spoken| **spoken == offer.trim()))
            .copied()
    }
}

// === impl Store ===

impl Store {
    /// Creates or replaces a pod by its whole record, such as one with labels and the states of containers.
    pub fn apply_pod_object(&self, pod: Value) {
        let text = |name: &str| pod["metadata"][name].as_str().unwrap_or_default().to_owned();
        let key = (Resource::Pods, text("namespace"), text("name"));
        self.write(key, pod);
    }

    /// Creates or replaces a node by its whole record.
    pub fn apply_node_object(&self, node: Value) {
        let name = node["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        self.write((Resource::Nodes, String::new(), name), node);
    }

    /// Lets commands run in a pod's container from now on.
    pub fn run_container(&self, namespace: &str, pod: &str, container: Container) {
        let key = (namespace.to_owned(), pod.to_owned());
        self.state().containers.insert(key, container);
    }

    /// Sets which protocol of commands the server speaks; at first the newest.
    pub fn speak_exec(&self, protocol: ExecProtocol) {
        self.state().exec_protocol = protocol;
    }
}

/// A part of a container's log.
pub(super) fn log(
    store: &Store,
    namespace: &str,
    pod: &str,
    call: &Call,
) -> Result<Response<Body>, Refusal> {
    let container = container(store, namespace, pod, call.fields.get("container"), "log")?;
    let path = match call.fields.get("previous").is_some_and(|it| it == "true") {
        true => container.former_log.ok_or_else(|| {
            let name = &container.name;
            bad_request(format!("previous terminated container {name:?} in pod {pod:?} not found"))
        })?,
        false => container.log,
    };
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = call.fields.get("tailLines").and_then(|tail| tail.parse().ok());
    let from = lines.len().saturating_sub(tail.unwrap_or(usize::MAX));
    let shown: String = lines[from..].iter().map(|line| format!("{line}\n")).collect();
    Ok(full(StatusCode::OK, "text/plain", shown))
}

/// The answer to a request for a command; what follows it is [`run`].
pub(super) fn upgrade(
    store: &Store,
    namespace: &str,
    pod: &str,
    call: &Call,
) -> Result<Response<Body>, Refusal> {
    container(store, namespace, pod, call.fields.get("container"), "exec")?;
    let key = call.header(header::SEC_WEBSOCKET_KEY);
    let is_upgrade =
        call.header(header::UPGRADE).is_some_and(|it| it.eq_ignore_ascii_case("websocket"));
    let (Some(key), true) = (key, is_upgrade) else {
        return Err(bad_request("you must specify at least 1 of stdin, stdout, stderr".to_owned()));
    };
    let offered = call.header(header::SEC_WEBSOCKET_PROTOCOL).unwrap_or_default();
    let chosen = store.state().exec_protocol.chosen(offered).ok_or_else(|| {
        (StatusCode::FORBIDDEN, "Forbidden", format!("no protocol of {offered:?} is spoken"))
    })?;
    let accept = derive_accept_key(key.as_bytes());
    let mut response = full(StatusCode::SWITCHING_PROTOCOLS, "", "");
    let headers = response.headers_mut();
    headers.clear();
    let value = |text: &str| HeaderValue::from_str(text).expect("ASCII of ours is a value");
    headers.insert(header::CONNECTION, value("Upgrade"));
    headers.insert(header::UPGRADE, value("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, value(&accept));
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, value(chosen));
    Ok(response)
}

/// The container of a pod that the caller may use.
fn container(
    store: &Store,
    namespace: &str,
    pod: &str,
    name: Option<&String>,
    part: &str,
) -> Result<Container, Refusal> {
    let state = store.state();
    let verb = if part == "exec" { "create" } else { "get" };
    if state.denied.contains(&(verb.to_owned(), format!("pods/{part}"))) {
        let message = format!(
            "pods {pod:?} is forbidden: User \"lab\" cannot {verb} resource \"pods/{part}\" in API group \"\" in the namespace {namespace:?}"
        );
        return Err((StatusCode::FORBIDDEN, "Forbidden", message));
    }
    state.find(Resource::Pods, Some(namespace), pod)?;
    let key = (namespace.to_owned(), pod.to_owned());
    let container =
        state.containers.get(&key).filter(|it| name.is_none_or(|name| *name == it.name));
    container.cloned().ok_or_else(|| {
        let name = name.map_or("", String::as_str);
        bad_request(format!("container {name} is not valid for pod {pod}"))
    })
}

/// Runs the command of `call`, once the connection is the client's and the container's.
pub(super) async fn run(
    store: &Store,
    namespace: &str,
    pod: &str,
    call: &Call,
    upgraded: OnUpgrade,
) -> Result<()> {
    let container = container(store, namespace, pod, call.fields.get("container"), "exec");
    let container = container.map_err(|(_, _, message)| anyhow::anyhow!(message))?;
    let io = TokioIo::new(upgraded.await.context("upgrading")?);
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
    // Real servers say so first that the connection is there.
    socket.send(Message::binary(vec![STDOUT])).await.context("sending")?;
    let words: Vec<String> = form_urlencoded::parse(call.query.as_bytes())
        .filter(|(name, _)| name == "command")
        .map(|(_, word)| word.into_owned())
        .collect();
    let status = match start(&container, &words) {
        Err(message) => {
            json!({ "metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "code": 500 })
        }
        Ok(mut child) => {
            let (sender, mut frames) = mpsc::channel(16);
            tokio::spawn(pump(STDOUT, child.stdout.take(), sender.clone()));
            tokio::spawn(pump(STDERR, child.stderr.take(), sender));
            loop {
                tokio::select! {
                    frame = frames.recv() => match frame {
                        Some(frame) => socket.send(Message::binary(frame)).await.context("sending")?,
                        None => break,
                    },
                    // The client has gone: so does the command.
                    gone = socket.next() => if !matches!(gone, Some(Ok(_))) {
                        return child.kill().await.context("ending a command");
                    },
                }
            }
            ended(child.wait().await.context("waiting for a command")?)
        }
    };
    let frame = [&[STATUS], status.to_string().as_bytes()].concat();
    socket.send(Message::binary(frame)).await.context("sending")?;
    socket.close(None).await.context("closing")
}

/// Starts a command, or says why not as a kubelet does.
fn start(container: &Container, words: &[String]) -> Result<tokio::process::Child, String> {
    let (name, arguments) = words.split_first().ok_or("no command is given")?;
    let program = container.programs.get(name).ok_or_else(|| {
        format!(
            "error executing command in container: failed to exec in container: OCI runtime exec failed: exec failed: unable to start container process: exec: {name:?}: executable file not found in $PATH"
        )
    })?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(container.environment.iter().cloned());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command.spawn().map_err(|error| error.to_string())
}

async fn pump(channel: u8, output: Option<impl AsyncRead + Unpin>, frames: mpsc::Sender<Vec<u8>>) {
    let Some(mut output) = output else { return };
    let mut buffer = vec![0; FRAME];
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        let frame = [&[channel], &buffer[..count]].concat();
        if frames.send(frame).await.is_err() {
            return;
        }
    }
}

/// The status of a command that has ended, in the kubelet's words.
fn ended(status: ExitStatus) -> Value {
    if status.success() {
        return json!({ "metadata": {}, "status": "Success" });
    }
    let code = status.code().unwrap_or(137);
    json!({
        "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_protocol_is_chosen_in_the_clients_order() {
        let offered = "v5.channel.k8s.io, v4.channel.k8s.io";
        assert_eq!(ExecProtocol::V5.chosen(offered), Some("v5.channel.k8s.io"));
        assert_eq!(ExecProtocol::V4.chosen(offered), Some("v4.channel.k8s.io"));
        assert_eq!(ExecProtocol::V4.chosen("v5.channel.k8s.io"), None);
    }
}
