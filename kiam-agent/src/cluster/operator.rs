//! What an operator's own kubeconfig gives access to: objects, logs, and commands in pods. The agent itself uses none of it.

use std::{io, path::Path};

use futures::{AsyncBufReadExt as _, StreamExt as _, stream::BoxStream};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    api::{Api, AttachParams, ListParams, LogParams},
    core::Request,
};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::{Error, client, describe, files::Origin, tls::Health};
use crate::proxy::Proxies;
use kiam_core::lifecycle::Readiness;

/// The objects in a page. Nodes are large.
const PAGE: u32 = 250;
/// The most bytes of each of a command's outputs that are read: a multiple of what an agent says of a full node. Many nodes
/// answer at once, and not all of them need be honest.
const MAX_OUTPUT: u64 = 4 << 20;
/// The buffer of a command's output.
const BUFFER: usize = 64 << 10;
/// The longest line of a log that is read whole.
const MAX_LINE: usize = 64 << 10;

/// A client with the rights of whoever runs a command on their own machine. Cheap to clone.
#[derive(Clone)]
pub struct OperatorClient(kube::Client);

/// Why a request to the API server has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestFailure {
    /// What failed.
    pub kind: FailureKind,
    /// The error, with the server's own words.
    pub message: String,
}

/// What failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The caller may not do it (401, 403).
    Forbidden,
    /// There is no such object (404).
    NotFound,
    /// The server, or the kubelet behind it, was not reached, or failed.
    Other,
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct ContainerName {
    pub namespace: String,
    pub pod: String,
    pub container: String,
}

/// What a command in a container printed, and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandOutput {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Its exit status; `None` if it has none, as when it could not be started.
    pub code: Option<i32>,
    /// What the kubelet says of its end, if that was no success.
    pub message: String,
}

/// Which part of a container's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogPart {
    /// Whether to go on with new lines.
    pub follow: bool,
    /// Of the container's former life.
    pub previous: bool,
    /// Only so many lines, the latest.
    pub tail: Option<i64>,
    /// Only lines of so many seconds, the latest.
    pub since_seconds: Option<i64>,
}

// === impl OperatorClient ===

impl OperatorClient {
    /// Reads the kubeconfig at `path`, or that of kubectl, with the cluster of `context`, or of the current one. Sends
    /// nothing yet.
    ///
    /// # Errors
    ///
    /// [`Error`] when it can't be used.
    pub fn new(
        path: Option<&Path>,
        context: Option<&str>,
        proxies: &Proxies,
    ) -> Result<Self, Error> {
        let origin =
            Origin::User { path: path.map(Path::to_owned), context: context.map(str::to_owned) };
        let health = Health::new("TLS with the Kubernetes API", &Readiness::default());
        client::connect(origin, proxies, health).map(Self)
    }

    /// The object at `path`.
    ///
    /// # Errors
    ///
    /// [`RequestFailure`].
    pub async fn get(&self, path: &str) -> Result<Value, RequestFailure> {
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        let request = Request::new(folder).get(name, &kube::api::GetParams::default());
        let request = request.map_err(RequestFailure::other)?;
        self.0.request(request).await.map_err(RequestFailure::from)
    }

    /// All objects at `path` with the label `selector`, if there is one.
    ///
    /// # Errors
    ///
    /// [`RequestFailure`].
    pub async fn list(
        &self,
        path: &str,
        selector: Option<&str>,
    ) -> Result<Vec<Value>, RequestFailure> {
        let mut params = ListParams::default().limit(PAGE);
        params.label_selector = selector.map(str::to_owned);
        let mut objects = Vec::new();
        loop {
            let request = Request::new(path).list(&params).map_err(RequestFailure::other)?;
            let mut page: Value = self.0.request(request).await?;
            if let Value::Array(items) = page["items"].take() {
                objects.extend(items);
            }
            match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token.to_owned()),
                None => return Ok(objects),
            }
        }
    }

    /// Runs `command` in a container, without a terminal and without input. Dropped, it is left to itself.
    ///
    /// # Errors
    ///
    /// [`RequestFailure`] if it was not run, as far as that is known.
    pub async fn run(
        &self,
        at: &ContainerName,
        command: &[String],
    ) -> Result<CommandOutput, RequestFailure> {
        let params = AttachParams::default()
            .container(&at.container)
            .stdin(false)
            .stdout(true)
            .stderr(true)
            .max_stdout_buf_size(BUFFER);
        let mut process = self.pods(at).exec(&at.pod, command, &params).await?;
        let (stdout, stderr) = (process.stdout(), process.stderr());
        let status = process.take_status();
        let (stdout, stderr) = tokio::join!(read(stdout), read(stderr));
        let (stdout, stderr) =
            (stdout.map_err(RequestFailure::other)?, stderr.map_err(RequestFailure::other)?);
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        let Some(status) = status else {
            let lost = "the connection ended before the command";
            return Err(RequestFailure::other(lost));
        };
        let mut output = CommandOutput { stdout, stderr, code: Some(0), message: String::new() };
        if status.status.as_deref() != Some("Success") {
            let causes = status.details.and_then(|details| details.causes).unwrap_or_default();
            let code = causes.iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"));
            output.code = code.and_then(|cause| cause.message.as_ref()?.parse().ok());
            output.message = status.message.unwrap_or_default();
        }
        Ok(output)
    }

    /// The lines of a container's log. Longer lines are cut.
    ///
    /// # Errors
    ///
    /// [`RequestFailure`].
    pub async fn log(
        &self,
        at: &ContainerName,
        part: LogPart,
    ) -> Result<BoxStream<'static, io::Result<String>>, RequestFailure> {
        let params = LogParams {
            container: Some(at.container.clone()),
            follow: part.follow,
            previous: part.previous,
            tail_lines: part.tail,
            since_seconds: part.since_seconds,
            ..LogParams::default()
        };
        let stream = self.pods(at).log_stream(&at.pod, &params).await?;
        let lines = futures::stream::unfold(Box::pin(stream), |mut stream| async move {
            let mut line = Vec::new();
            loop {
                // As much at once as the buffer has, so that a line without end does not fill the memory.
                let part = match stream.fill_buf().await {
                    Ok(part) if part.is_empty() && line.is_empty() => return None,
                    Ok(part) => part,
                    Err(error) => return Some((Err(error), stream)),
                };
                let end = part.iter().position(|byte| *byte == b'\n');
                let (taken, is_whole) = (end.map_or(part.len(), |at| at + 1), end.is_some());
                let room = MAX_LINE - line.len().min(MAX_LINE);
                line.extend_from_slice(&part[..end.unwrap_or(part.len()).min(room)]);
                let is_last = part.is_empty();
                stream.consume_unpin(taken);
                if is_whole || is_last {
                    return Some((Ok(String::from_utf8_lossy(&line).into_owned()), stream));
                }
            }
        });
        Ok(lines.boxed())
    }

    fn pods(&self, at: &ContainerName) -> Api<Pod> {
        Api::namespaced(self.0.clone(), &at.namespace)
    }
}

// === impl RequestFailure ===

impl RequestFailure {
    fn other(error: impl ToString) -> Self {
        Self { kind: FailureKind::Other, message: error.to_string() }
    }
}

impl From<kube::Error> for RequestFailure {
    fn from(error: kube::Error) -> Self {
        let kind = match &error {
            kube::Error::Api(status) if matches!(status.code, 401 | 403) => FailureKind::Forbidden,
            kube::Error::Api(status) if status.code == 404 => FailureKind::NotFound,
            _ => FailureKind::Other,
        };
        Self { kind, message: describe(&error) }
    }
}

/// All that comes, up to the limit: what is beyond is not read, and the command blocks.
async fn read(output: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(output) = output {
        output.take(MAX_OUTPUT).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}
