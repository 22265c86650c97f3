//! The agent's image: imported and run by containerd, and its program as the agent of a node whose API server it knows by
//! name alone, since the resolver of a static program is not the one that the tests otherwise run with. The program of the
//! other processor's image starts on loopback: QEMU emulates the processor for one program, and the kernel is this machine's.

use std::{
    fs::{self, Permissions},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab::{
    Agent, Lab, Node, PodSpec,
    fake::{Place, imds::NODE_ACCESS_KEY, kubernetes::Kubernetes, sts::Sts},
    loopback::{self, LoopbackAgent},
    role_base_arn,
    runtime::Containerd,
};
use tokio::time::Instant;
use xtask::command::printed;

/// The agent, in an image.
const PROGRAM: &str = "usr/local/bin/kiam-agent";
const ROLE: &str = "reader";
/// The API server's name, which the lab's DNS server alone knows.
const NAME: &str = "api.lab.invalid";
const READY: Duration = Duration::from_secs(60);

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The archive for this machine's processor, which `cargo xtask image` wrote.
    archive: PathBuf,
    /// The folder with its files.
    root: PathBuf,
    /// The version that the agent must report.
    #[arg(long)]
    version: String,
    /// What runs programs of another processor, such as `qemu-aarch64`.
    #[arg(long, requires = "emulated")]
    emulator: Option<PathBuf>,
    /// The folder with the files of that processor's image.
    #[arg(long, requires = "emulator")]
    emulated: Option<PathBuf>,
}

/// Fails where the image does not do what an image must.
pub(crate) fn run(options: &Options) -> Result<()> {
    lab::available().map_err(anyhow::Error::msg)?;
    in_containerd(options)?;
    as_agent(&options.root.join(PROGRAM))?;
    match (&options.emulator, &options.emulated) {
        (Some(emulator), Some(root)) => emulated(emulator, &root.join(PROGRAM), &options.version),
        _ => Ok(()),
    }
}

fn in_containerd(options: &Options) -> Result<()> {
    let node = Node::start()?;
    let containerd = Containerd::start(&node)?;
    printed(containerd.ctr(["images", "import"])?.arg(&options.archive))?;
    let name = format!("docker.io/library/kiam-agent:{}", options.version);
    let run = ["run", "--rm", "--net-host", "--runc-binary"];
    let mut run = containerd.ctr(run)?;
    run.arg(containerd.runc()).args([&name, "version", "kiam-agent", "--version"]);
    let text = printed(&mut run)?;
    ensure!(text.contains(&options.version), "the image's agent calls itself {text:?}");
    println!("containerd runs it: {}", text.trim());
    Ok(())
}

fn as_agent(binary: &Path) -> Result<()> {
    let lab = Lab::start()?;
    let (address, folder) = (lab.kubernetes.address(), lab.node.folder());
    let SocketAddr::V4(address) = address else { bail!("the API server is at {address}") };
    let queries = serve_dns(&lab.node, *address.ip())?;
    let settings = folder.join("resolv.conf");
    fs::write(&settings, "nameserver 127.0.0.1\n").context("writing for the resolver")?;
    let kubeconfig = fs::read_to_string(lab.kubeconfig()?).context("reading the kubeconfig")?;
    let by_name = folder.join("kubeconfig-by-name");
    let server = format!("{NAME}:{}", address.port());
    fs::write(&by_name, kubeconfig.replace(&address.to_string(), &server))
        .context("writing a kubeconfig")?;
    let script = "mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"";
    let mut command = lab.node.command("unshare")?;
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script, "sh"]);
    command.arg(&settings).arg(binary);
    let kubeconfig = format!("--kubeconfig={}", by_name.display());
    let mut agent = Agent::start_by(command, &lab, &[&kubeconfig])?;
    let took = agent.wait_ready(READY)?;
    ensure!(queries.load(Ordering::Relaxed) > 0, "the agent found {NAME} without DNS");
    let pod = lab.pod(PodSpec::new("default", "web").role(ROLE))?;
    lab.assert_role(&pod.credentials()?, ROLE);
    println!("a node's agent: ready in {took:?}, and a pod has its role");
    agent.terminate()?;
    Ok(())
}

/// The agent on loopback, up to where QEMU's emulation of one program reaches: it reads the Kubernetes API by TLS. Then it
/// ends, as QEMU knows neither `SO_DETACH_FILTER` nor bpf(2), before or after STS has answered.
fn emulated(emulator: &Path, binary: &Path, version: &str) -> Result<()> {
    let text = printed(Command::new(emulator).arg(binary).arg("--version"))?;
    ensure!(text.contains(version), "the emulated agent calls itself {text:?}");
    let folder = tempfile::tempdir().context("making a folder")?;
    let starter = folder.path().join("starter");
    let script = format!("#!/bin/sh\nexec {} {} \"$@\"\n", emulator.display(), binary.display());
    fs::write(&starter, script).context("writing what starts the agent")?;
    fs::set_permissions(&starter, Permissions::from_mode(0o755)).context("making it a program")?;
    let kubernetes = Kubernetes::start(Place::loopback())?;
    kubernetes.write_kubeconfig(&folder.path().join("kubeconfig"))?;
    let sts = Sts::start(Place::loopback(), NODE_ACCESS_KEY)?;
    loopback::schedule(&kubernetes, &loopback::pod(1).role(ROLE));
    let base = format!("--role-base-arn={}", role_base_arn());
    let keys = [("AWS_ACCESS_KEY_ID", NODE_ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", "secret")];
    let mut agent = LoopbackAgent::begin(&starter, folder.path(), &sts.url(), &keys, &[&base])?;
    // In JSON, a line for each kind of object.
    let synced = r#""resource":"Pods","count":1"#;
    let begun = Instant::now();
    loop {
        // In this order, as it may end right after what is waited for.
        let ended = agent.status()?.is_some();
        if agent.said(synced) {
            break;
        }
        ensure!(!ended && begun.elapsed() < READY, "it said:\n{}", agent.log());
        thread::sleep(Duration::from_millis(10));
    }
    println!(
        "emulated: {} knows its node's pod {:?} after its start",
        text.trim(),
        begun.elapsed()
    );
    Ok(())
}

/// Answers every question for an address with `address`, and counts the questions. Ends with this process.
fn serve_dns(node: &Node, address: Ipv4Addr) -> Result<Arc<AtomicUsize>> {
    let socket: UdpSocket = node.netns().udp((Ipv4Addr::LOCALHOST, 53).into())?;
    let count = Arc::new(AtomicUsize::new(0));
    let queries = Arc::clone(&count);
    thread::spawn(move || {
        let mut message = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut message) {
            if let Some(answer) = answer(&message[..length], address) {
                queries.fetch_add(1, Ordering::Relaxed);
                // Who asked is gone when this fails.
                let _sent = socket.send_to(&answer, from);
            }
        }
    });
    Ok(count)
}

/// The answer to a question of RFC 1035: one record for type A, none for others. `None` for what is no question.
fn answer(question: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let name = question.get(HEADER..)?.iter().position(|byte| *byte == 0)?;
    let end = HEADER + name + 5;
    let is_a = question.get(end - 4..end)? == [0, 1, 0, 1];
    let mut answer = question[..2].to_vec();
    // A response, recursion available; one question, and the number of answers.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    answer.extend(&question[HEADER..end]);
    if is_a {
        // The name as a pointer to the question's, A, IN, 60 s, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
