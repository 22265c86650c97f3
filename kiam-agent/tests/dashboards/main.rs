//! The dashboard and the alerts of `deploy/monitoring`, fed with a real agent's metrics by a real Prometheus.
//!
//! `faults` takes minutes, and is run by `cargo xtask test dashboards` alone.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod faults;
mod picture;

use std::{collections::BTreeSet, thread, time::Duration};

use lab::{
    Agent, Lab, LabPod, PodSpec,
    monitoring::{alerts, panels, rules, selectors},
    pod_client::{Imds, Options, Via},
    prometheus::Prometheus,
};
use serde_json::{Value, json};
use tokio::time::Instant;
use xtask::prometheus::Prometheus as Package;

/// Nothing that a test waits for takes so long but a mistake, on a slow machine too.
const LIMIT: Duration = Duration::from_secs(180);
/// The window of rates. A sample comes each second.
const WINDOW: &str = "30s";
/// Of kube-state-metrics, which no agent serves.
const FOREIGN: [&str; 1] = ["KiamAgentMissing"];

/// The rules, firing as soon as they hold.
fn rules_at_once(edits: &[(&str, &str, &str)]) -> Value {
    let mut rules = rules();
    for rule in rules["groups"][0]["rules"].as_array_mut().unwrap() {
        rule.as_object_mut().unwrap().remove("for");
        let name = rule["alert"].clone();
        for (_, from, to) in edits.iter().filter(|(alert, ..)| name == **alert) {
            let text = rule["expr"].as_str().unwrap();
            assert!(text.contains(from), "{text} has no {from}");
            rule["expr"] = json!(text.replace(from, to));
        }
    }
    rules
}

/// A Prometheus that has scraped the agent, and has seen nothing of what was before.
fn watch(package: &Package, lab: &Lab, edits: &[(&str, &str, &str)]) -> Prometheus {
    let prometheus = Prometheus::start(package, lab, &rules_at_once(edits)).unwrap();
    lab::eventually("the agent is scraped", || {
        let scraped = prometheus.query("kiam_agent_ready").is_ok_and(|it| !it.is_empty());
        scraped && !prometheus.firing().unwrap().contains("KiamMetricsMissing")
    });
    prometheus
}

/// The values of a query's answer that are numbers.
fn numbers(answer: &[Value]) -> Vec<f64> {
    let value = |series: &Value| series["value"][1].as_str()?.parse::<f64>().ok();
    answer.iter().filter_map(value).filter(|value| !value.is_nan()).collect()
}

/// Waits until all `expressions` have a number for an answer, doing `traffic` meanwhile.
fn answered(prometheus: &Prometheus, mut expressions: Vec<String>, mut traffic: impl FnMut()) {
    let began = Instant::now();
    loop {
        traffic();
        let is_empty = |it: &String| numbers(&prometheus.query(it).unwrap()).is_empty();
        expressions.retain(is_empty);
        if expressions.is_empty() {
            return;
        }
        assert!(began.elapsed() < LIMIT, "no answers to {expressions:#?}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// What all kinds of pods do: they get credentials, are rejected and denied.
struct Traffic<'a> {
    lab: &'a Lab,
    orders: LabPod,
    scratch: LabPod,
    csi: LabPod,
    comers: u32,
}

// === impl Traffic ===

impl<'a> Traffic<'a> {
    fn start(lab: &'a Lab) -> Self {
        let pod = |spec: PodSpec| lab.pod(spec).unwrap();
        Self {
            lab,
            orders: pod(PodSpec::new("shop", "orders").role("orders")),
            scratch: pod(PodSpec::new("shop", "scratch")),
            csi: pod(PodSpec::new("kube-system", "csi").service_account("csi")),
            comers: 0,
        }
    }

    fn play(&mut self) {
        let once = |pod: &LabPod, options: &Options| drop(pod.ask_once(options).unwrap());
        once(&self.orders, &Options::default());
        once(&self.orders, &Options { imds: Imds::V1, ..Options::default() });
        once(&self.orders, &Options::get("/latest/user-data"));
        once(&self.orders, &Options { port: 8080, ..Options::connect() });
        once(&self.orders, &Options { via: Via::Udp, ..Options::default() });
        once(&self.scratch, &Options::default());
        once(&self.csi, &Options::default());
        // Not more than a namespace may request at once.
        if self.comers < 8 {
            self.comers += 1;
            let name = format!("comer{}", self.comers);
            let comer = self.lab.pod(PodSpec::new("shop", &name).role(&name)).unwrap();
            once(&comer, &Options::default());
            self.lab.delete(comer);
        }
    }
}

/// `promtool check metrics` reads Prometheus' text format, where a counter's family has its whole name.
fn as_text_format(open_metrics: &str) -> String {
    let mut counters = BTreeSet::new();
    for line in open_metrics.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if let ["#", "TYPE", name, "counter"] = words.as_slice() {
            counters.insert((*name).to_owned());
        }
    }
    let mut text = String::new();
    for line in open_metrics.lines().filter(|line| *line != "# EOF") {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words.as_slice() {
            ["#", kind, name, rest] if counters.contains(*name) => {
                text.push_str(&format!("# {kind} {name}_total {rest}\n"));
            }
            _ => text.push_str(&format!("{line}\n")),
        }
    }
    text
}

fn assert_conventions(package: &Package, agent: &Agent) {
    let mut check = package.promtool();
    check.args(["check", "metrics"]);
    let text = as_text_format(&agent.metrics());
    assert!(text.contains("# TYPE kiam_imds_requests_total counter\n"), "{text}");
    xtask::command::printed_for(&mut check, &text).expect("no complaint");
    // And the check would say something.
    let wrong = text.replace("kiam_imds_requests_total", "kiam_imds_requests");
    xtask::command::printed_for(&mut check, &wrong).expect_err("a counter without _total");
}

#[test]
fn each_query_of_the_dashboard_is_answered_by_a_real_agent() {
    let Some(lab) = lab::node_test!() else { return };
    let Some(package) = lab::prometheus::package("dashboards") else { return };
    let units = tempfile::tempdir().unwrap();
    let boot_guard = format!("--boot-guard={}", units.path().display());
    let flags = [&boot_guard, "--node-role=kube-system/csi", "--selftest-interval=1s"];
    let agent = lab.agent(&flags);
    let prometheus = watch(&package, &lab, &[]);
    let mut traffic = Traffic::start(&lab);
    let targets = panels(WINDOW).into_iter().flat_map(|panel| panel.targets);
    let all: Vec<String> = targets.map(|(expression, _)| expression).collect();
    assert!(all.len() > 50, "{}", all.len());
    let (observed, mut asked): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|expression| expression.contains("kiam_observed_pods"));
    let rules = alerts().into_iter().filter(|alert| !FOREIGN.contains(&alert.name.as_str()));
    asked.extend(rules.flat_map(|alert| selectors(&alert.expression)).map(|selector| {
        // What the kernel has not counted is 0 for an alert, and what never was is no fault of its name.
        format!("count({selector})")
    }));
    asked.sort();
    asked.dedup();
    answered(&prometheus, asked, || traffic.play());
    assert_conventions(&package, &agent);
    // What this traffic is worth a line for, and nothing else; least of all a page. Rules fire at once here, so that the guard,
    // which the agent tries each minute, may be unknown yet.
    let mut firing = prometheus.firing().unwrap();
    firing.remove("KiamGuardUnknown");
    let only = BTreeSet::from(["KiamV1Users".to_owned()]);
    assert_eq!(firing, only, "{:#?}", prometheus.alerts().unwrap());
    picture::draw_if_asked(&prometheus, || traffic.play());
    drop((prometheus, traffic, agent));

    let _agent = lab.agent(&["--mode=observe"]);
    let prometheus = watch(&package, &lab, &[]);
    let pod = lab.pod(PodSpec::new("shop", "other").role("orders")).unwrap();
    answered(&prometheus, observed, || drop(pod.ask_once(&Options::default())));
}
