//! Pods that start as fast as a node can start them: no image to pull, and a first process that asks at once.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use jiff::{Timestamp, Unit};
use lab::{Layout, PodSpec, eventually_is, pod_client::Options};

use super::{Handler, Kubelet, Stage, ask};

/// Pods that ask all the time meanwhile, and how often each of their 2 threads pauses.
const OTHERS: [&str; 2] = ["invoices", "reports"];
const PAUSE_MS: u64 = 30;

/// When what happened to one pod.
#[derive(Clone, Debug)]
struct Times {
    uid: String,
    /// `RunPodSandbox` was called, and returned.
    asked: Timestamp,
    made: Timestamp,
    /// The first process of its first container, which asks as the first thing it does, was answered.
    answered: Timestamp,
}

/// Makes a pod whose only container asks, and takes it away.
fn start_one(stage: &Stage, kubelet: &Kubelet, name: &str, handler: Handler) -> Times {
    let spec = stage.schedule(name, "orders");
    let asked = Timestamp::now();
    let sandbox = kubelet.run_sandbox(&spec, handler).unwrap();
    let made = Timestamp::now();
    let command = ask("orders");
    let container = kubelet.start(&sandbox, ("main", 0), &command.each_ref().map(|word| &**word));
    // The kubelet tells the API about a pod's address when it has started its containers.
    let container = container.unwrap();
    stage.publish(kubelet, &spec, &sandbox);
    let exited = kubelet.wait(&container).unwrap();
    stage.assert_served(&exited, "orders");
    let uid = spec.uid.clone().unwrap();
    stage.delete(kubelet, &spec, sandbox);
    Times { uid, asked, made, answered: exited.first_line.unwrap() }
}

/// Makes `count` pods, as many together as there are `makers`, and asserts that the first connect of each went to the
/// listener inside.
fn start_many(stage: &Stage, makers: usize, count: usize, handler: Handler) {
    let (node, inside) = stage.ways();
    let next = AtomicUsize::new(0);
    let make = || {
        let kubelet = stage.kubelet();
        let mut times = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return times;
            }
            let name = format!("{}-{makers}-{number}", handler.name());
            times.push(start_one(stage, &kubelet, &name, handler));
        }
    };
    let times: Vec<Times> = thread::scope(|scope| {
        let makers: Vec<_> = (0..makers).map(|_| scope.spawn(make)).collect();
        makers.into_iter().flat_map(|maker| maker.join().unwrap()).collect()
    });
    let (node_after, inside_after) = stage.ways();
    let by_node = node_after - node;
    println!(
        "{} by {makers} at a time, {count} pods: {by_node} asked by the node's path",
        handler.name()
    );
    assert_eq!(by_node, 0, "of {count} pods");
    assert!(inside_after - inside >= count as u64);
    show(stage, &times);
}

/// Prints how long what took.
fn show(stage: &Stage, times: &[Times]) {
    let log = stage.agent.log();
    // `2026-01-02T03:04:05.678901Z DEBUG … Pod listener open pod.uid=…`
    let listening = |times: &Times| -> Timestamp {
        let said = |line: &&str| line.contains("Pod listener open") && line.contains(&times.uid);
        let line = log.lines().find(said).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let each =
        |from_to: &dyn Fn(&Times) -> (Timestamp, Timestamp)| times.iter().map(from_to).collect();
    show_one("sandbox asked for, until it is made", each(&|of| (of.asked, of.made)));
    show_one("sandbox asked for, until listening", each(&|of| (of.asked, listening(of))));
    show_one("sandbox made, until the first answer", each(&|of| (of.made, of.answered)));
    show_one("listening, until the first answer", each(&|of| (listening(of), of.answered)));
}

/// As minimum, median and maximum, in milliseconds.
fn show_one(what: &str, from_to: Vec<(Timestamp, Timestamp)>) {
    let took = from_to.into_iter().map(|(from, to)| (to - from).total(Unit::Millisecond).unwrap());
    let mut took: Vec<f64> = took.collect();
    took.sort_by(f64::total_cmp);
    let (least, median, most) = (took[0], took[took.len() / 2], took[took.len() - 1]);
    println!("  {what:<38} {least:7.1} {median:7.1} {most:7.1}");
}

/// Prints how long it took from a process in the pod's cgroup until there were listeners.
fn show_ready(stage: &Stage) {
    let metrics = stage.agent.metrics();
    let buckets = metrics.lines().filter_map(|line| {
        let bucket = line.strip_prefix("kiam_sandboxes_ready_seconds_bucket{le=\"")?;
        let (bound, count) = bucket.split_once("\"} ")?;
        Some((bound, count.parse::<u64>().unwrap()))
    });
    let buckets: Vec<_> = buckets.collect();
    let all = buckets.last().unwrap().1;
    let within = |count: u64| buckets.iter().find(|bucket| bucket.1 >= count).unwrap().0;
    let (half, all_within) = (within(all.div_ceil(2)), within(all));
    println!("listeners of {all} pods: half within {half} s, all within {all_within} s");
}

#[test]
fn the_first_process_of_every_pod_asks_the_listener_inside() {
    let Some(stage) = Stage::set("the_first_process_of_every_pod_asks_the_listener_inside", &[])
    else {
        return;
    };
    println!("{}", stage.kubelet().version().unwrap());
    let others = OTHERS.map(|role| stage.lab.pod(PodSpec::new("load", role).role(role)).unwrap());
    eventually_is("listeners", &(others.len() as u64), || stage.inside());
    let asked = Options { pause_ms: PAUSE_MS, ..Options::default() };
    let asking = others.each_ref().map(|pod| pod.ask_from(2, &asked).unwrap());
    // More at a time by hand.
    let makers = std::env::var("KIAM_TEST_MAKERS").map_or(2, |text| text.parse().unwrap());
    start_many(&stage, 1, 12, Handler::Runc);
    start_many(&stage, makers, 12 * makers, Handler::Runc);
    start_many(&stage, makers, 6 * makers, Handler::Crun);
    for asking in asking {
        let tally = asking.finish().unwrap();
        println!("{} others were answered meanwhile", tally.attempts());
        assert!(tally.failures.is_empty() && tally.attempts() > 100, "{:?}", tally.failures);
    }
    show_ready(&stage);
}

#[test]
fn the_first_process_of_a_pod_without_a_sandboxs_process_asks_as_any() {
    const PODS: usize = 12;
    let test = "the_first_process_of_a_pod_without_a_sandboxs_process_asks_as_any";
    let Some(stage) = Stage::set(test, &[]) else { return };
    for handler in [Handler::Runc, Handler::Crun] {
        let (node, inside) = stage.ways();
        for number in 0..PODS {
            let spec = PodSpec::new("shop", &format!("{}-{number}", handler.name())).role("orders");
            let spec = stage.lab.schedule(spec.layout(Layout::CgroupfsBurstable)).unwrap();
            let pod = stage.lab.node.pod(spec).unwrap();
            let command = ask("orders");
            let command = command.each_ref().map(|word| &**word);
            let exited = stage.containerd.run_without_sandbox(&pod, handler, &command).unwrap();
            stage.assert_served(&exited, "orders");
            stage.lab.delete(pod);
        }
        let (node_after, inside_after) = stage.ways();
        let (node, inside) = (node_after - node, inside_after - inside);
        println!(
            "{} without a sandbox's process, {PODS} pods: {node} asked by the node's path",
            handler.name()
        );
        assert_eq!(node + inside, PODS as u64);
        // The runtime may be faster than an agent that waits for a processor.
        assert!(node <= 1, "{node} of {PODS}");
    }
}
