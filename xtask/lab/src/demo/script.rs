//! What the demo shows, step by step.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Result, bail};

use super::transcript::{Given, Transcript, millis, show};
use crate::{
    AGENT_PORT, Agent, IMDS_V4, Lab, LabPod, NODE_V4, PodSpec, READY_LIMIT,
    fake::imds::{NODE_ACCESS_KEY, NODE_ROLE},
    has_ipv6,
    pod_client::{
        Imds, Options, Via,
        attack::{Attack, frame, raw},
    },
    role_arn,
};

pub(super) const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";
/// Namespace, name, role.
pub(super) const CAST: [(&str, &str, Option<&str>); 4] = [
    ("shop", "orders", Some("shop-orders")),
    ("shop", "invoices", Some("shop-invoices")),
    ("data", "reports", Some("analytics/reports")),
    ("data", "scratch", None),
];

/// The stage: lab, agent, pods and what was shown.
pub(super) struct Script {
    // The agent goes first, then the pods, then the node.
    pub(super) agent: Option<Agent>,
    pub(super) pods: Vec<LabPod>,
    pub(super) lab: Lab,
    pub(super) binary: PathBuf,
    pub(super) transcript: Transcript,
    interrupted: Arc<AtomicBool>,
}

// === impl Script ===

impl Script {
    pub(super) fn start(binary: PathBuf, interrupted: Arc<AtomicBool>) -> Result<Self> {
        println!(
            "kiam-ebpf: the real agent on a lab node, with stand-ins for Kubernetes, STS and IMDS"
        );
        let lab = Lab::start()?;
        let transcript = Transcript::new();
        transcript.agent(&binary)?;
        transcript.say(format!("node   {NODE_V4}, files in {}", lab.node.folder().display()));
        Ok(Self { agent: None, pods: Vec::new(), lab, binary, transcript, interrupted })
    }

    pub(super) fn play(&mut self) -> Result<()> {
        let steps = [
            Self::without_agent,
            Self::agent_starts,
            Self::each_gets_its_own,
            Self::every_way_in,
            Self::no_way_round,
            Self::nothing_gets_past,
            Self::agent_is_replaced,
            Self::agent_dies,
            Self::agent_returns,
        ];
        for step in steps {
            if self.interrupted.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            step(self)?;
        }
        Ok(())
    }

    pub(super) fn verdict(&self) -> Result<()> {
        self.transcript.verdict(|| self.agent.as_ref().map(|agent| agent.log()).unwrap_or_default())
    }

    pub(super) fn pods(&self) -> &[LabPod] {
        &self.pods
    }

    pub(super) fn folder(&self) -> &Path {
        self.lab.node.folder()
    }

    /// The file that has the log of the agent that runs.
    pub(super) fn agent_log(&self) -> Option<&Path> {
        self.agent.as_ref().map(|agent| agent.log_path())
    }

    pub(super) fn agent_pid(&self) -> u32 {
        self.agent.as_ref().map_or(0, |agent| agent.pid())
    }

    fn without_agent(&mut self) -> Result<()> {
        self.transcript.section("Without the agent, any pod can take the node's own credentials");
        for (namespace, name, role) in CAST {
            let spec = PodSpec::new(namespace, name);
            let spec = role.into_iter().fold(spec, PodSpec::role);
            self.pods.push(self.lab.pod(spec)?);
        }
        let pod = &self.pods[0];
        let attempt = pod.credentials()?;
        let given = Given::read(&attempt);
        let packets = self.packets();
        self.transcript.claim(
            format!(
                "{:<16}{:<8}{:<18}{:<22}{packets} packets at the real IMDS",
                label(pod),
                show(&attempt),
                given.role,
                given.access_key
            ),
            &[
                ("it got the node's credentials", given.access_key == NODE_ACCESS_KEY),
                ("they are of the node's role", given.role == NODE_ROLE),
                ("its packets were counted", packets > 0),
            ],
        );
        Ok(())
    }

    fn agent_starts(&mut self) -> Result<()> {
        self.transcript.section("The agent starts");
        let mut agent = Agent::start(&self.lab, &self.binary, &[])?;
        let took = agent.wait_ready(READY_LIMIT)?;
        self.agent = Some(agent);
        let issued = self.lab.sts.issued();
        let roles: Vec<String> = CAST.iter().filter_map(|cast| cast.2).map(role_arn).collect();
        self.transcript.claim(
            format!(
                "ready after {}; AssumeRole was called {} times, before any pod asked",
                millis(took),
                issued.len()
            ),
            &[
                ("one call for each role", issued.len() == roles.len()),
                (
                    "every role has its session",
                    roles.iter().all(|role| issued.iter().any(|issued| issued.role == *role)),
                ),
            ],
        );
        Ok(())
    }

    fn each_gets_its_own(&mut self) -> Result<()> {
        self.transcript
            .section("Each pod asks 169.254.169.254 as an SDK does: token, role, credentials");
        self.transcript.say(Given::HEAD);
        self.ask_all()?;
        Ok(())
    }

    /// Shows what each pod gets, and checks with STS whose it is.
    pub(super) fn ask_all(&mut self) -> Result<()> {
        for (pod, (.., role)) in self.pods.iter().zip(CAST) {
            let attempt = pod.credentials()?;
            let owner = self.lab.role_of(&attempt);
            self.transcript.answer(&label(pod), &attempt, role, owner);
        }
        Ok(())
    }

    fn every_way_in(&mut self) -> Result<()> {
        self.transcript.section("The same by every address and protocol version");
        let pod = &self.pods[0];
        let role = CAST[0].2.map(role_arn);
        let ways = [
            ("IMDSv1, without a token", Via::V4, Imds::V1),
            ("::ffff:169.254.169.254 (dual-stack socket)", Via::V4Mapped, Imds::V2),
            ("fd00:ec2::254 (IPv6)", Via::V6, Imds::V2),
        ];
        let usable = |via: &Via| matches!(via, Via::V4) || has_ipv6();
        for (what, via, imds) in ways.into_iter().filter(|(_, via, _)| usable(via)) {
            let attempt = pod.ask_once(&Options { via, imds, ..Options::default() })?;
            let key = Given::read(&attempt).access_key;
            let owner = self.lab.role_of(&attempt);
            self.transcript.claim(
                format!("{:<16}{:<8}{what:<44}{key}", label(pod), show(&attempt)),
                &[("STS issued this key for the pod's role", owner == role)],
            );
        }
        Ok(())
    }

    fn no_way_round(&mut self) -> Result<()> {
        self.transcript.section("And no way round");
        let pod = &self.pods[0];
        let other = format!("{CREDENTIALS}shop-invoices");
        let agent = Options {
            to: Some(NODE_V4.into()),
            port: AGENT_PORT,
            imds: Imds::V1,
            ..Options::get(CREDENTIALS)
        };
        let tries = [
            ("the role of another pod", Options::get(&other), "403"),
            ("the node's user data", Options::get("/latest/user-data"), "404"),
            ("the agent's own port, directly", agent, "EPERM"),
            (
                "another port of the metadata service",
                Options { port: 8080, ..Options::default() },
                "EPERM",
            ),
            (
                "UDP to the metadata service",
                Options { via: Via::Udp, ..Options::default() },
                "EPERM",
            ),
        ];
        for (what, options, expected) in tries {
            let attempt = pod.ask_once(&options)?;
            self.transcript.rejected(&label(pod), what, &attempt, expected);
        }
        Ok(())
    }

    /// What no hook at connect sees.
    fn nothing_gets_past(&mut self) -> Result<()> {
        self.transcript.section("Nor past the hooks: packets are sent, and none arrives");
        let pod = &self.pods[0];
        let (from, to) = (pod.v4().into(), IMDS_V4.into());
        let mut attacker = pod.attacker()?;
        let before = self.packets();
        let tries = [
            ("a ping", Attack::Raw { way: raw::Way::Echo, from, to }),
            ("a TCP SYN by a raw socket", Attack::Raw { way: raw::Way::SynHeader, from, to }),
            (
                "a TCP SYN by a packet socket",
                Attack::Frame { way: frame::Way::Raw, from, to, interface: None },
            ),
        ];
        for (what, attack) in tries {
            let got = show(&attacker.attempt(attack, 1000)?);
            self.transcript.say(format!("{:<16}{got:<14}{what}", label(pod)));
        }
        let leaked = self.packets() - before;
        self.transcript.claim(
            format!("packets of these at the real IMDS: {leaked}"),
            &[("none got there", leaked == 0)],
        );
        Ok(())
    }

    /// Packets of all the pods that have arrived at the real metadata service.
    pub(super) fn packets(&self) -> u64 {
        let seen = self.lab.imds.packets();
        let sources = self.pods.iter().flat_map(LabPod::ips);
        sources.filter_map(|source| seen.get(&source)).sum()
    }
}

pub(super) fn label(pod: &LabPod) -> String {
    format!("{}/{}", pod.spec().namespace, pod.spec().name)
}
