//! The real metadata service is slow, and one pod asks it all the time.

use std::{thread, time::Duration};

use lab::{PodSpec, eventually, fake::Injected, pod_client::Options};

const SLOW: &str = "/latest/meta-data/mac";
/// Asked for each pod as well; the lab's service has no such thing.
const OTHER: &str = "meta-data/hostname";
/// Within this an SDK has an answer; a slot of the flood's comes free after a second.
const IN_TIME: Duration = Duration::from_millis(500);

#[test]
fn a_pod_that_floods_a_slow_metadata_service_delays_no_other() {
    let Some(lab) = lab::node_test!() else { return };
    let flags = ["--allow-path=/latest/meta-data/mac", "--allow-path=/latest/meta-data/hostname"];
    let _agent = lab.agent(&flags);
    let flooder = lab.pod(PodSpec::new("mob", "neighbour")).unwrap();
    let victim = lab.pod(PodSpec::new("shop", "victim")).unwrap();
    let hung = lab.imds.faults().inject(Injected::hang().path(SLOW));
    let flood = flooder.ask_from(32, &Options { timeout_ms: 3000, ..Options::get(SLOW) }).unwrap();
    eventually("the flood", || hung.met() >= 4);
    for round in 0..10 {
        // What all pods share, at first unknown to the agent, and what is asked for each pod.
        for (path, status) in [("dynamic/instance-identity/document", 200), (OTHER, 404)] {
            let attempt = victim.get(&format!("/latest/{path}")).unwrap();
            let took = Duration::from_micros(attempt.micros);
            let in_time = attempt.status == Some(status) && took < IN_TIME;
            assert!(in_time, "{round} {path}: {attempt:?}");
        }
        thread::sleep(Duration::from_millis(100));
    }
    hung.lift();
    flood.finish().unwrap();
}
