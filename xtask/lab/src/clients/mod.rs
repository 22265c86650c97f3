//! Real AWS clients in the lab's pods, the real agent, and moto as the AWS account: each pod must be exactly its own role,
//! and moto's own records say who it is.

mod account;
mod javascript;
mod process;
mod python;
mod slow;
mod verdict;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use lab::fake::Place;
use lab::fake::imds::{ACCOUNT, Imds, REGION};
use lab::fake::kubernetes::{Kubernetes, NamespaceRecord, PodRecord};
use lab::{LabPod, NODE_NAME, NODE_V4, Node, PodSpec};

use self::account::Account;
use self::process::{Client, Process};
use self::python::Python;
use self::verdict::{Seen, verdict};
use xtask::build;
use xtask::command::{say, workspace};

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
    let python = Python::ensure()?;
    build::programs()?;
    let node = Node::start()?;
    let imds = Imds::start(node.imds_netns())?;
    let (account, credentials) = Account::open(&node, &python, &ROLES)?;
    imds.set_node_credentials(
        &credentials.access_key_id,
        &credentials.secret_access_key,
        &credentials.session_token,
    );
    let pods = CASES.iter().map(|case| node.pod(spec(case))).collect::<Result<Vec<_>>>()?;
    let kubernetes = kubernetes(&node, &pods)?;
    let agent = start_agent(&node, &kubernetes, &account)?;
    let outcome = ask(&node, &python, &account, &pods).and_then(|()| untouched(&imds, &pods));
    if outcome.is_err() {
        say(format!("the agent's last words:\n{}", agent.log()));
    }
    outcome?;
    slow::run(&python)
}

fn spec(case: &Case) -> PodSpec {
    let spec = PodSpec::new(case.namespace, case.name);
    match case.annotation {
        Some(role) => spec.role(role),
        None => spec,
    }
}

/// An API server that knows the pods; of the namespaces only one permits roles.
fn kubernetes(node: &Node, pods: &[LabPod]) -> Result<Kubernetes> {
    let kubernetes = Kubernetes::start(Place::inside(node.netns(), ([127, 0, 0, 1], 0).into()))?;
    kubernetes.apply_namespace(
        &NamespaceRecord::new("shop").annotation("iam.amazonaws.com/permitted", ".*/team/.*"),
    );
    kubernetes.apply_namespace(&NamespaceRecord::new("closed"));
    for pod in pods {
        let spec = pod.spec();
        let record = PodRecord::scheduled(&spec.namespace, &spec.name, pod.uid(), NODE_NAME);
        let record = spec
            .annotations
            .iter()
            .fold(record, |record, (key, value)| record.annotation(key, value));
        kubernetes.apply_pod(&record.running(&pod.ips()));
    }
    Ok(kubernetes)
}

fn start_agent(node: &Node, kubernetes: &Kubernetes, account: &Account<'_>) -> Result<Process> {
    let kubeconfig = node.folder().join("kubeconfig");
    kubernetes.write_kubeconfig(&kubeconfig)?;
    let path = |path: &Path| path.display().to_string();
    let mut command = node.command(lab::agent_binary()?)?;
    command.env_clear().args([
        format!("--host={NODE_V4}"),
        "--port=3100".to_owned(),
        format!("--kubeconfig={}", path(&kubeconfig)),
        format!("--node-name={NODE_NAME}"),
        format!("--cgroup={}", path(node.kubepods())),
        format!("--bpffs={}", path(&node.bpffs().join("kiam"))),
        format!("--state-dir={}", path(&node.folder().join("state"))),
        format!("--sts-endpoint={}", account.endpoint()),
        format!("--region={REGION}"),
        format!("--role-base-arn=arn:aws:iam::{ACCOUNT}:role/"),
        "--namespace-policy=required".to_owned(),
    ]);
    let mut agent = Process::start("agent", &mut command, node.folder())?;
    agent.wait_until_it_answers(node.netns(), ([127, 0, 0, 1], 3101).into(), "/ready")?;
    Ok(agent)
}

/// Runs each client in all pods at once.
fn ask(node: &Node, python: &Python, account: &Account<'_>, pods: &[LabPod]) -> Result<()> {
    let home = node.folder().join("home");
    fs::create_dir_all(&home).with_context(|| format!("making {}", home.display()))?;
    for kind in &CLIENTS {
        let clients = pods
            .iter()
            .map(|pod| Client::start(&mut command(kind, pod, python, account, &home)?))
            .collect::<Result<Vec<_>>>()?;
        let ended = clients.into_iter().map(Client::finish).collect::<Result<Vec<_>>>()?;
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

/// A client with nothing else to find: no other credentials in its environment, its home or its arguments.
fn command(
    kind: &ClientKind,
    pod: &LabPod,
    python: &Python,
    account: &Account<'_>,
    home: &Path,
) -> Result<Command> {
    let mut command = pod.command(python.program(kind.program))?;
    command.current_dir(workspace()).env_clear().args(kind.arguments).env("HOME", home);
    command.env("AWS_REGION", REGION).env("AWS_DEFAULT_REGION", REGION);
    command.env("AWS_ENDPOINT_URL_STS", account.endpoint()).env("PYTHONDONTWRITEBYTECODE", "1");
    command.envs(kind.environment.iter().copied());
    Ok(command)
}

/// No pod reached the node's own metadata service.
fn untouched(imds: &Imds, pods: &[LabPod]) -> Result<()> {
    for pod in pods {
        let packets: u64 = pod.ips().into_iter().map(|address| imds.packets_from(address)).sum();
        if packets > 0 {
            bail!(
                "{packets} packets of pod {} reached the node's metadata service",
                pod.spec().name
            );
        }
    }
    Ok(())
}
