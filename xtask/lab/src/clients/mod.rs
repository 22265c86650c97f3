//! Real AWS clients in the lab's pods, the real agent, and moto as the AWS account: each pod must be exactly its own role,
//! and moto's own records say who it is.

mod account;
mod javascript;
mod slow;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use lab::fake::imds::{ACCOUNT, REGION};
use lab::fake::kubernetes::NamespaceRecord;
use lab::{Agent, Lab, LabPod, PodSpec, READY_LIMIT, agent_binary};

use self::account::Account;
use self::verdict::{Seen, verdict};
use xtask::command::{say, workspace};
use xtask::{build, python};

/// Where the clients are, of pinned versions.
const PYTHON: &str = "target/acceptance/venv";
/// Seconds after which a client is ended.
const LIMIT: &str = "60";
const ROLES: [&str; 2] = ["/team/reader", "/team/writer"];

/// A pod, and the role that it is to have by the end.
struct Case {
    namespace: &'static str,
    name: &'static str,
    annotation: Option<&'static str>,
    role: Option<&'static str>,
}

const CASES: [Case; 4] = [
    Case {
        namespace: "shop",
        name: "reader",
        annotation: Some("team/reader"),
        role: Some("team/reader"),
    },
    Case {
        namespace: "shop",
        name: "writer",
        annotation: Some("arn:aws:iam::123456789012:role/team/writer"),
        role: Some("team/writer"),
    },
    Case { namespace: "shop", name: "without", annotation: None, role: None },
    Case { namespace: "closed", name: "forbidden", annotation: Some("team/reader"), role: None },
];

/// A program that asks for credentials as programs do.
struct ClientKind {
    name: &'static str,
    program: &'static str,
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
}

/// What they are made of.
const REQUIREMENTS: &str = "xtask/lab/acceptance/requirements.txt";
const SCRIPT: &str = "xtask/lab/acceptance/client.py";
const CLIENTS: [ClientKind; 4] = [
    ClientKind {
        name: "boto3",
        program: "python",
        arguments: &[SCRIPT, "boto3"],
        environment: &[],
    },
    ClientKind {
        name: "boto3, IMDSv2 only",
        program: "python",
        arguments: &[SCRIPT, "boto3"],
        environment: &[("AWS_EC2_METADATA_V1_DISABLED", "true")],
    },
    ClientKind {
        name: "IMDSv1",
        program: "python",
        arguments: &[SCRIPT, "imdsv1"],
        environment: &[],
    },
    ClientKind {
        name: "AWS CLI",
        program: "aws",
        arguments: &["sts", "get-caller-identity", "--output", "json", "--query", "{arn: Arn}"],
        environment: &[],
    },
];

/// Runs the clients; without root there is no node to run them on.
pub(crate) fn run(no_skip: bool) -> Result<()> {
    if let Err(reason) = lab::available() {
        if no_skip {
            bail!("the clients can't run: {reason}");
        }
        say(format!("skipped: clients: {reason}"));
        return Ok(());
    }
    python::environment(&workspace().join(PYTHON), REQUIREMENTS)?;
    build::programs()?;
    let lab = Lab::start()?;
    let (account, credentials) = Account::open(&lab.node, &ROLES)?;
    lab.imds.set_node_credentials(
        &credentials.access_key_id,
        &credentials.secret_access_key,
        &credentials.session_token,
    );
    let shop = NamespaceRecord::new("shop").annotation("iam.amazonaws.com/permitted", ".*/team/.*");
    lab.kubernetes.apply_namespace(&shop);
    let pods = CASES.iter().map(|case| lab.pod(spec(case))).collect::<Result<Vec<_>>>()?;
    let endpoint = format!("--sts-endpoint={}", account.endpoint());
    let flags = [endpoint.as_str(), "--namespace-policy=required"];
    let mut agent = Agent::start(&lab, &agent_binary()?, &flags)?;
    agent.wait_ready(READY_LIMIT)?;
    let outcome = ask(&lab, &account, &pods).and_then(|()| untouched(&lab, &pods));
    if outcome.is_err() {
        say(format!("the agent said:\n{}", agent.log()));
    }
    outcome?;
    slow::run()
}

fn spec(case: &Case) -> PodSpec {
    let spec = PodSpec::new(case.namespace, case.name);
    case.annotation.into_iter().fold(spec, PodSpec::role)
}

/// A program of the clients' environment: `python`, `aws`, `moto_server`.
fn program(name: &str) -> PathBuf {
    workspace().join(PYTHON).join("bin").join(name)
}

/// Runs each client in all pods at once.
fn ask(lab: &Lab, account: &Account<'_>, pods: &[LabPod]) -> Result<()> {
    let home = lab.node.folder().join("home");
    fs::create_dir_all(&home).with_context(|| format!("making {}", home.display()))?;
    for kind in &CLIENTS {
        let ended = finished(pods.iter().map(|pod| command(kind, pod, account, &home)))?;
        let records = account.records()?;
        for (case, ended) in CASES.iter().zip(ended) {
            let place = || format!("{} in pod {}/{}", kind.name, case.namespace, case.name);
            let role = case.role.map(|role| format!("arn:aws:iam::{ACCOUNT}:role/{role}"));
            let seen = Seen::read(&ended).with_context(place)?;
            verdict(role.as_deref(), &seen, &records)
                .map_err(anyhow::Error::msg)
                .with_context(place)?;
            say(format!(
                "{}: {}",
                place(),
                role.as_deref().unwrap_or("no credentials, as it must be")
            ));
        }
    }
    Ok(())
}

/// A client in a pod, which is ended when it takes too long.
fn client(pod: &LabPod, program: impl AsRef<Path>) -> Result<Command> {
    let mut command = pod.command("timeout")?;
    command.args(["--kill-after=1", LIMIT]).arg(program.as_ref()).current_dir(workspace());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// Starts these clients, and returns how each of them ended and what it printed.
fn finished(commands: impl Iterator<Item = Result<Command>>) -> Result<Vec<Output>> {
    let start = |command: Result<Command>| command?.spawn().context("starting a client");
    let clients = commands.map(start).collect::<Result<Vec<Child>>>()?;
    let end = |client: Child| client.wait_with_output().context("waiting for a client");
    clients.into_iter().map(end).collect()
}

/// A client with nothing else to find: no other credentials in its environment, its home or its arguments.
fn command(kind: &ClientKind, pod: &LabPod, account: &Account<'_>, home: &Path) -> Result<Command> {
    let mut command = client(pod, program(kind.program))?;
    command.env_clear().args(kind.arguments).env("HOME", home);
    command.env("AWS_REGION", REGION).env("AWS_DEFAULT_REGION", REGION);
    command.env("AWS_ENDPOINT_URL_STS", account.endpoint()).env("PYTHONDONTWRITEBYTECODE", "1");
    command.envs(kind.environment.iter().copied());
    Ok(command)
}

/// No pod reached the node's own metadata service.
fn untouched(lab: &Lab, pods: &[LabPod]) -> Result<()> {
    for pod in pods {
        let packets: u64 =
            pod.ips().into_iter().map(|address| lab.imds.packets_from(address)).sum();
        if packets > 0 {
            bail!(
                "{packets} packets of pod {} reached the node's metadata service",
                pod.spec().name
            );
        }
    }
    Ok(())
}
