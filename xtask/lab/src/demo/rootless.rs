//! `cargo xtask demo --rootless`: the same agent on loopback, without root and without BPF. Pods are records in the
//! Kubernetes API and addresses of 127.0.0.0/8, by which the agent tells them apart.

use std::{path::PathBuf, process::Command, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use tokio::time::Instant;

use super::{
    script::{CAST, CREDENTIALS},
    transcript::{Given, Transcript, millis, show},
};
use crate::{
    fake::{
        Place,
        imds::{Imds, REGION},
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord},
        sts::Sts,
    },
    loopback::{self, LoopbackAgent, LoopbackNode},
    pod_client::{self, Options},
    role_arn, role_base_arn,
};

/// How long STS' sessions live. The agent renews nothing in the first ten seconds.
const SESSION: Duration = Duration::from_secs(14);
/// Nothing takes so long but a mistake, on a slow machine too.
const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
const PERMITTED: &str = "iam.amazonaws.com/permitted";

/// The node, its pods in the order of [`CAST`], and what was shown.
struct Stage {
    node: LoopbackNode,
    imds: Imds,
    pods: Vec<PodRecord>,
    binary: PathBuf,
    transcript: Transcript,
}

/// Shows the agent at work without root.
pub(super) fn run(binary: PathBuf) -> Result<()> {
    println!(
        "kiam-ebpf: the real agent on loopback, without root, with stand-ins for Kubernetes, STS and IMDS"
    );
    let mut stage = Stage::start(binary)?;
    for step in [
        Stage::each_gets_its_own,
        Stage::requests_are_rejected,
        Stage::namespaces_decide,
        Stage::credentials_are_renewed,
        Stage::operators_see_it,
        Stage::an_outage_is_survived,
    ] {
        step(&mut stage)?;
    }
    println!("\nWhat this can't show: it needs root, and is in `cargo xtask demo`");
    stage.transcript.say("interception  pods here ask the agent's address, not 169.254.169.254");
    stage.transcript.say("attestation   the source address says who asks, not the kernel");
    stage.transcript.say("the guard, takeovers, and denial of pods while no agent runs");
    stage.transcript.verdict(|| stage.node.agent.log())
}

// === impl Stage ===

impl Stage {
    fn start(binary: PathBuf) -> Result<Self> {
        let mut transcript = Transcript::new();
        transcript.agent(&binary)?;
        transcript.section("The agent starts, and asks STS before any pod asks the agent");
        let kubernetes = Kubernetes::start(Place::loopback())?;
        let pods: Vec<PodRecord> =
            (1..).zip(CAST).map(|(number, cast)| pod(number, cast)).collect();
        pods.iter().for_each(|pod| loopback::schedule(&kubernetes, pod));
        let imds = Imds::on_loopback()?;
        let sts = Sts::start(Place::loopback(), crate::fake::imds::NODE_ACCESS_KEY)?;
        sts.set_session_length(Some(SESSION));
        let folder = tempfile::tempdir().context("making a folder")?;
        kubernetes.write_kubeconfig(&folder.path().join("kubeconfig"))?;
        let flags = [
            "--identity=source-ip".to_owned(),
            format!("--upstream={}", imds.url()),
            format!("--role-base-arn={}", role_base_arn()),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let begun = Instant::now();
        let agent = LoopbackAgent::start_in(&binary, folder, &sts.url(), &[], &flags)?;
        let mut stage =
            Self { node: LoopbackNode { agent, kubernetes, sts }, imds, pods, binary, transcript };
        stage.until("ready", |stage| stage.node.status("/ready") == 200)?;
        let issued = stage.node.sts.issued();
        let roles: Vec<String> = CAST.iter().filter_map(|cast| cast.2).map(role_arn).collect();
        stage.transcript.claim(
            format!(
                "ready after {}; AssumeRole was called {} times",
                millis(begun.elapsed()),
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
        Ok(stage)
    }

    fn each_gets_its_own(&mut self) -> Result<()> {
        self.transcript
            .section("Each pod asks by IMDSv2, as an SDK does: token, role, credentials");
        self.transcript.say(Given::HEAD);
        for index in 0..self.pods.len() {
            self.asks(index);
        }
        Ok(())
    }

    /// Shows what the pod gets, and checks with STS whose it is.
    fn asks(&mut self, index: usize) {
        let pod = &self.pods[index];
        let attempt = self.node.credentials(pod);
        let owner = self.node.role_of(&attempt);
        self.transcript.answer(&label(pod), &attempt, pod.annotated_role(), owner);
    }

    fn requests_are_rejected(&mut self) -> Result<()> {
        self.transcript.section("What no pod gets");
        let data = NamespaceRecord::new("data").annotation("iam.amazonaws.com/imdsv2", "required");
        self.node.kubernetes.apply_namespace(&data);
        let v1 = Options { imds: pod_client::Imds::V1, ..Options::get(CREDENTIALS) };
        let unknown = loopback::pod(999);
        let (orders, reports) = (self.pods[0].clone(), self.pods[2].clone());
        self.until("IMDSv2 alone", |stage| stage.node.ask(&reports, &v1).status == Some(401))?;
        let tries = [
            (
                "the role of another pod",
                &orders,
                Options::get(&format!("{CREDENTIALS}shop-invoices")),
                "403",
            ),
            (
                "the node's role",
                &orders,
                Options::get(&format!("{CREDENTIALS}lab-node-role")),
                "403",
            ),
            ("the node's user data", &orders, Options::get("/latest/user-data"), "404"),
            ("IMDSv1, in a namespace that requires IMDSv2", &reports, v1, "401"),
            ("any role, from an address that no pod has", &unknown, Options::default(), "404"),
        ];
        for (what, pod, options, expected) in tries {
            let attempt = self.node.ask(pod, &options);
            let who = if pod.uid == unknown.uid { "nobody".to_owned() } else { label(pod) };
            self.transcript.rejected(&who, what, &attempt, expected);
        }
        let attempt = self.node.ask(&orders, &Options::get("/latest/meta-data/placement/region"));
        self.transcript.claim(
            format!(
                "{:<16}{:<14}but the region, from the real IMDS: {}",
                label(&orders),
                show(&attempt),
                attempt.body
            ),
            &[("it is the node's", attempt.body == REGION)],
        );
        Ok(())
    }

    fn namespaces_decide(&mut self) -> Result<()> {
        self.transcript.section("A namespace permits roles by a regular expression");
        let permitted = [role_arn("analytics/.*"), role_arn("(analytics/.*|shop-orders)")];
        let curious = loopback::pod(9).role("shop-orders");
        let curious =
            PodRecord { namespace: "data".to_owned(), name: "curious".to_owned(), ..curious };
        let data = NamespaceRecord::new("data");
        self.node.kubernetes.apply_namespace(&data.clone().annotation(PERMITTED, &permitted[0]));
        loopback::schedule(&self.node.kubernetes, &curious);
        self.pods.push(curious.clone());
        self.until("the pod", |stage| stage.node.credentials(&curious).reason().contains("match"))?;
        self.transcript.say(format!("namespace data: permitted = {}", permitted[0]));
        let attempt = self.node.credentials(&curious);
        self.transcript.rejected(
            &label(&curious),
            "shop-orders, as it is annotated",
            &attempt,
            "404",
        );
        self.asks(2);
        let text = self.agent_says(&["explain", "data/curious"]);
        let line = text.lines().find(|line| line.contains("forbids")).unwrap_or_default().trim();
        self.transcript.claim(
            format!(
                "kiam-agent explain: {:.70}",
                line.split_whitespace().collect::<Vec<_>>().join(" ")
            ),
            &[("it says why", !line.is_empty())],
        );
        self.node.kubernetes.apply_namespace(&data.annotation(PERMITTED, &permitted[1]));
        self.until("its role", |stage| stage.node.credentials(&curious).status == Some(200))?;
        self.transcript.say(format!("namespace data: permitted = {}", permitted[1]));
        self.asks(self.pods.len() - 1);
        Ok(())
    }

    fn credentials_are_renewed(&mut self) -> Result<()> {
        self.transcript
            .section("Credentials are renewed before they expire, while a pod keeps asking");
        let pod = self.pods[0].clone();
        let first = self.node.credentials(&pod).field("AccessKeyId");
        let (mut asked, mut served, mut slowest) = (0_u32, 0_u32, Duration::ZERO);
        let begun = Instant::now();
        let last = loop {
            let attempt = self.node.credentials(&pod);
            asked += 1;
            served += u32::from(attempt.status == Some(200));
            slowest = slowest.max(Duration::from_micros(attempt.micros));
            let key = attempt.field("AccessKeyId");
            if key != first && key.is_some() {
                break attempt;
            }
            ensure!(begun.elapsed() < LIMIT, "the credentials of {} never changed", label(&pod));
            thread::sleep(PAUSE);
        };
        let given = Given::read(&last);
        let owner = self.node.role_of(&last);
        self.transcript.claim(
            format!(
                "{} asked {asked} times, answered {served}, in {} at most",
                label(&pod),
                millis(slowest)
            ),
            &[("every answer has credentials", asked == served)],
        );
        self.transcript.claim(
            format!(
                "{:<16}{} gave way to {} (expires {})",
                label(&pod),
                first.unwrap_or_default(),
                given.access_key,
                given.expires_in
            ),
            &[(
                "STS issued the new key for the same role",
                owner == pod.annotated_role().map(role_arn),
            )],
        );
        Ok(())
    }

    fn operators_see_it(&mut self) -> Result<()> {
        self.transcript.section("Operators see it in the metrics");
        let issued = self.node.sts.issued().len();
        let metrics = self.node.metrics();
        let roles = CAST.iter().filter(|cast| cast.2.is_some()).count();
        // A renewal may come between the two.
        let lines = [
            ("kiam_credentials_held{state=\"ready\"}", roles..=roles),
            ("kiam_credentials_issued_total{outcome=\"Ok\"}", issued..=issued + roles),
            ("kiam_imds_refusals_total{reason=\"OtherRole\"}", 2..=2),
        ];
        for (name, expected) in lines {
            let value =
                metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            let shown = value.map_or_else(|| "-".to_owned(), |value: usize| value.to_string());
            self.transcript.claim(
                format!("{name} {shown}"),
                &[("it is what was asked", value.is_some_and(|value| expected.contains(&value)))],
            );
        }
        Ok(())
    }

    fn an_outage_is_survived(&mut self) -> Result<()> {
        self.transcript.section("Kubernetes and STS go away: known pods are served");
        self.node.kubernetes.stop();
        self.node.sts.stop();
        self.asks(0);
        self.asks(1);
        let log = self.node.agent.log();
        let secret = self.node.credentials(&self.pods[0]).field("SecretAccessKey");
        let logged = secret.as_ref().is_none_or(|secret| log.contains(secret));
        let leaked = self.imds.requests_of(&format!("{CREDENTIALS}lab-node-role"));
        self.transcript.claim(
            format!("the node's own credentials were read {leaked} times, by the agent for its calls to STS"),
            &[("the agent read them", leaked > 0), ("no secret key is in its log", !logged)],
        );
        Ok(())
    }

    /// What a subcommand of the agent prints.
    fn agent_says(&self, words: &[&str]) -> String {
        let state = self.node.agent.folder().join("state");
        let output = Command::new(&self.binary)
            .args(words)
            .arg("--state-dir")
            .arg(state)
            .env_clear()
            .output();
        output.map_or_else(
            |error| error.to_string(),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !holds(self) {
            if begun.elapsed() > LIMIT {
                bail!("never came: {what}; the agent said:\n{}", self.node.agent.log());
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }
}

fn pod(number: u16, (namespace, name, role): (&str, &str, Option<&str>)) -> PodRecord {
    let [namespace, name] = [namespace, name].map(str::to_owned);
    let pod = PodRecord { namespace, name, ..loopback::pod(number) };
    role.into_iter().fold(pod, PodRecord::role)
}

fn label(pod: &PodRecord) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}
