//! The lease of an agent that has next to no processor time, while a pod asks for more than it can answer.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use kiam_kernel::intercept::last_renewed;
use lab::{Lab, PodSpec, pod_client::hostile::Program};
use tokio::time::Instant;

/// How long the pod asks.
const ATTACK: Duration = Duration::from_secs(20);
/// The kernel denies all pods from twice that on.
const AGE: Duration = Duration::from_secs(5);
/// Of each 100 ms, in microseconds: 5 % of a processor.
const QUOTA: &str = "5000";

/// A cgroup of the `cpu` controller; drop removes it.
struct Squeezed(PathBuf);

impl Squeezed {
    /// `None` where the machine has no such controller to give.
    fn new() -> Option<Self> {
        let name = format!("kiam-lease-{}", std::process::id());
        let (v1, v2) = (Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup"));
        let path = [v1, v2].map(|root| root.join(&name)).into_iter().find(|path| {
            let made = fs::create_dir(path).is_ok();
            let squeezes = ["cpu.cfs_quota_us", "cpu.max"];
            made && squeezes.iter().any(|file| path.join(file).exists())
        })?;
        // Where real-time is kept from cgroups, this one has none otherwise.
        let _ = fs::write(path.join("cpu.rt_runtime_us"), "10000");
        Some(Self(path))
    }

    fn squeeze(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        let v1 = self.0.join("cpu.cfs_quota_us");
        match v1.exists() {
            true => fs::write(v1, QUOTA).unwrap(),
            false => fs::write(self.0.join("cpu.max"), format!("{QUOTA} 100000")).unwrap(),
        }
    }
}

impl Drop for Squeezed {
    fn drop(&mut self) {
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn the_lease_holds_with_a_twentieth_of_a_processor_under_a_flood() {
    if lab::skip!() {
        return;
    }
    let Some(squeezed) = Squeezed::new() else {
        println!("skipped: no cpu controller of cgroups");
        return;
    };
    let lab = Lab::start().unwrap();
    // No self-test meanwhile, which has deadlines of its own.
    let agent = lab.agent(&["--selftest-interval=1h"]);
    let pod = lab.pod(PodSpec::new("shop", "flood").role("flood")).unwrap();
    lab.assert_served(&pod, "flood");
    squeezed.squeeze(agent.pid());
    let flood = Program::Pipeline { connections: 200, burst: 500, reads: false };
    let flood = pod.hostile(&flood).unwrap();
    let (begun, mut oldest) = (Instant::now(), Duration::ZERO);
    while begun.elapsed() < ATTACK {
        let age = last_renewed(&lab.pins()).expect("it has not ended");
        oldest = oldest.max(age);
        thread::sleep(Duration::from_millis(50));
    }
    let report = flood.finish().unwrap();
    assert!(report.0.get("requests").is_some_and(|requests| *requests > 0), "{report:?}");
    println!("{report:?}");
    let stat = fs::read_to_string(squeezed.0.join("cpu.stat")).unwrap_or_default();
    println!("the oldest renewal was {oldest:?} old; {}", stat.replace('\n', ", "));
    assert!(oldest < AGE, "{oldest:?}\n{}", agent.log());
    drop((agent, lab));
}
