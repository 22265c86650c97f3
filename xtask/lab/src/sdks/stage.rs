//! A node with an agent of one combination of flags, a pod that has a role, one whose role AWS denies, and one without.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::fake::aws::Aws;
use lab::fake::{Injected, Place};
use lab::{Agent, Lab, LabPod, NODE_V4, PodSpec, agent_binary, role_arn};
use tokio::time::Instant;

const READY_LIMIT: Duration = Duration::from_secs(60);
/// The role of the pod that has one.
pub(super) const ROLE: &str = "team/reader";
const DENIED: &str = "team/denied";

/// How pods reach the agent, and whether it wants tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Combination {
    pub(super) path: &'static str,
    pub(super) imdsv2: &'static str,
}

pub(super) const COMBINATIONS: [Combination; 4] = [
    Combination { path: "pod-local", imdsv2: "optional" },
    Combination { path: "pod-local", imdsv2: "required" },
    Combination { path: "node", imdsv2: "optional" },
    Combination { path: "node", imdsv2: "required" },
];

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--path={} --imdsv2={}", self.path, self.imdsv2)
    }
}

/// What the clients run on.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) combination: Combination,
    pub(super) lab: Lab,
    pub(super) aws: Aws,
    pub(super) reader: LabPod,
    pub(super) denied: LabPod,
    pub(super) without: LabPod,
    agent: Agent,
}

// === impl Stage ===

impl Stage {
    /// Starts all of it, and waits until STS has answered for both roles.
    pub(super) fn start(combination: Combination) -> Result<Self> {
        let lab = Lab::start()?;
        let aws = Aws::start(Place::inside(lab.node.netns(), (NODE_V4, 0).into()))?;
        let denial = Injected::refuse(403, "AccessDenied").field("RoleArn", &role_arn(DENIED));
        lab.sts.faults().inject(denial);
        let agent = agent_binary().context("looking for the agent")?;
        let flags = [combination.path, combination.imdsv2];
        let flags = [format!("--path={}", flags[0]), format!("--imdsv2={}", flags[1])];
        let mut agent = Agent::start(&lab, &agent, &flags.each_ref().map(String::as_str))?;
        agent.wait_ready(READY_LIMIT)?;
        let pod = |name: &str, role: Option<&str>| {
            let spec = PodSpec::new("shop", name);
            lab.pod(match role {
                Some(role) => spec.role(role),
                None => spec,
            })
        };
        let (reader, denied) = (pod("reader", Some(ROLE))?, pod("denied", Some(DENIED))?);
        let without = pod("without", None)?;
        until_answered(&reader, 200, &agent)?;
        until_answered(&denied, 404, &agent)?;
        Ok(Self { combination, lab, aws, reader, denied, without, agent })
    }

    /// No pod's packet has reached the node's own metadata service.
    pub(super) fn finish(self) -> Result<()> {
        let packets = self.lab.imds.attackers_packets();
        if !packets.is_empty() {
            bail!("packets of pods reached the node's metadata service: {packets:?}");
        }
        Ok(())
    }

    /// What the agent has logged.
    pub(super) fn log(&self) -> String {
        self.agent.log()
    }
}

fn until_answered(pod: &LabPod, status: u16, agent: &Agent) -> Result<()> {
    let begun = Instant::now();
    loop {
        let attempt = pod.credentials()?;
        if attempt.status == Some(status) {
            return Ok(());
        }
        if begun.elapsed() > READY_LIMIT {
            bail!(
                "pod {} is answered {attempt:?}; the agent said:\n{}",
                pod.spec().name,
                agent.log()
            );
        }
    }
}
