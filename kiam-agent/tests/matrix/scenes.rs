//! Attempts of several steps, by pods and processes that come and go. Each returns what the one that matters got.

use std::{fs, net::SocketAddr, thread, time::Duration};

use lab::{
    Cgroup, LabPod, Layout, PodSpec,
    pod_client::{
        Attempt, Options,
        attack::{Attack, stream::Way},
    },
    tells_namespaces_apart,
};

use crate::{
    eventually,
    rows::IMDS,
    stage::{Cast, Stage, Who},
};

/// More than one network namespace may hold (1,024).
const FLOOD: u32 = 1100;
/// How often a pod that has just come asks once it is served.
const ASKED_AGAIN: usize = 10;

/// A hostNetwork pod listens on the agent's port. If it can, what another pod gets.
pub(crate) fn squat(stage: &mut Stage<'_>, at: SocketAddr, reuse_port: bool) -> Attempt {
    let squatted = stage.attempt(Who::HostPod, Attack::Squat { at, reuse_port }, 1000);
    if squatted.error.is_some() {
        return squatted;
    }
    let asked = stage.ask(&stage.cast.pod);
    stage.attempt(Who::HostPod, Attack::Release, 1000);
    asked
}

/// What a pod gets while another connects from its address and port, `victim`.
pub(crate) fn forged_meanwhile(stage: &mut Stage<'_>, victim: SocketAddr) -> Attempt {
    let attack = || Attack::Stream { way: Way::Connect, to: IMDS, from: Some(victim) };
    let [own, thiefs] = stage.attempts((Who::Pod, attack()), (Who::Thief, attack()));
    let thiefs_role = stage.lab.role_of(&thiefs);
    let own_role = lab::role_arn(Cast::THIEFS_ROLE);
    assert!(thiefs_role.is_none_or(|role| role == own_role), "the thief got the victim's");
    own
}

/// A process makes its socket in its own pod's cgroup and connects it in another's.
pub(crate) fn moved_to_sibling(stage: &mut Stage<'_>) -> Attempt {
    let mut attacker = stage.cast.pod.attacker().unwrap();
    let cgroup = stage.cast.thief.cgroup().path().to_owned();
    attacker.must(Attack::Make { to: IMDS }).unwrap();
    attacker.must(Attack::Move { cgroup }).unwrap();
    attacker.attempt(Attack::ConnectKept { to: IMDS }, stage.patience()).unwrap()
}

/// The same, in a host daemon's.
pub(crate) fn moved_out(stage: &mut Stage<'_>) -> Attempt {
    let mut attacker = stage.cast.pod.attacker().unwrap();
    let cgroup = stage.cast.daemon.path().to_owned();
    attacker.must(Attack::Make { to: IMDS }).unwrap();
    attacker.must(Attack::Move { cgroup }).unwrap();
    attacker.attempt(Attack::ConnectKept { to: IMDS }, stage.patience()).unwrap()
}

/// A process in the pod's network makes its socket before it is moved into the pod's cgroup, as one that is exec'ed can.
pub(crate) fn moved_in(stage: &mut Stage<'_>) -> Attempt {
    let mut attacker = stage.cast.pod.attacker_in(&stage.cast.daemon).unwrap();
    let cgroup = stage.cast.pod.cgroup().path().to_owned();
    attacker.must(Attack::Make { to: IMDS }).unwrap();
    attacker.must(Attack::Move { cgroup }).unwrap();
    attacker.attempt(Attack::ConnectKept { to: IMDS }, 500).unwrap()
}

/// A process in the pod's network that is never in the pods' cgroup.
pub(crate) fn outside(stage: &mut Stage<'_>) -> Attempt {
    let mut attacker = stage.cast.pod.attacker_in(&stage.cast.daemon).unwrap();
    let attack = Attack::Stream { way: Way::Connect, to: IMDS, from: None };
    attacker.attempt(attack, 500).unwrap()
}

/// The pod connects a socket that `maker` made and passed to it.
pub(crate) fn passed(stage: &mut Stage<'_>, maker: Who) -> Attempt {
    let path = stage.lab.node.folder().join("passing");
    let mut maker = maker.attacker(stage.lab, stage.cast);
    let mut attacker = stage.cast.pod.attacker().unwrap();
    attacker.must(Attack::Expect { path: path.clone() }).unwrap();
    maker.must(Attack::Make { to: IMDS }).unwrap();
    maker.must(Attack::Pass { path: path.clone() }).unwrap();
    attacker.must(Attack::Receive).unwrap();
    fs::remove_file(path).unwrap();
    attacker.attempt(Attack::ConnectKept { to: IMDS }, stage.patience()).unwrap()
}

/// The pod's root makes a cgroup that is named as another pod's, and asks from it.
pub(crate) fn disguised(stage: &mut Stage<'_>) -> Attempt {
    let (pod, other) = (&stage.cast.pod, &stage.cast.thief);
    let name = Layout::SystemdBurstable.container(other.uid(), "c0ffee");
    let disguise = Cgroup::create(pod.cgroup().path().join(name)).unwrap();
    pod.ask_in(&disguise, &stage.options()).unwrap()
}

/// The API says that another pod has this one's address too.
pub(crate) fn twin(stage: &mut Stage<'_>) -> Attempt {
    as_twins(stage, |stage| stage.ask(&stage.cast.pod))
}

/// The other has it in truth, with the node's route; the first may not get an answer now, but never a wrong one.
pub(crate) fn second_twin(stage: &mut Stage<'_>) -> Attempt {
    as_twins(stage, |stage| {
        let (first, second) = (&stage.cast.pod, &stage.cast.thief);
        second.attract(first.v4()).unwrap();
        let first_ones = first.ask_once(&Options { timeout_ms: 250, ..Options::default() });
        let bind = Some(first.v4().into());
        let second_ones = second.ask_once(&Options { bind, ..stage.options() }).unwrap();
        first.attract(first.v4()).unwrap();
        let first_ones = stage.lab.role_of(&first_ones.unwrap());
        let own = lab::role_arn(Cast::ROLE);
        assert!(first_ones.is_none_or(|role| role == own), "the first twin got the second's");
        second_ones
    })
}

fn as_twins(stage: &mut Stage<'_>, act: impl Fn(&Stage<'_>) -> Attempt) -> Attempt {
    let (first, second): (&LabPod, &LabPod) = (&stage.cast.pod, &stage.cast.thief);
    stage.lab.publish_with(second, &first.ips());
    let attempt = act(stage);
    stage.lab.publish(second);
    attempt
}

/// What a pod gets that has just come, at once and for a while after. Where the kernel does not distinguish network
/// namespaces, a pod has to wait until its address is known.
pub(crate) fn just_come(stage: &mut Stage<'_>) -> Attempt {
    let lab = stage.lab;
    let pod = lab.unpublished_pod(PodSpec::new("shop", "new").role(Cast::ROLE)).unwrap();
    if !tells_namespaces_apart().unwrap() {
        lab.publish(&pod);
        if stage.state.serves() {
            eventually("its address is known", || stage.ask(&pod).status == Some(200));
        }
    }
    let mut attempt = stage.ask(&pod);
    for _ in 0..ASKED_AGAIN {
        if attempt.status != Some(200) {
            break;
        }
        thread::sleep(Duration::from_millis(20));
        attempt = stage.ask(&pod);
    }
    lab.delete(pod);
    attempt
}

/// A pod goes; the next one gets its address while the watch is silent. What the next one gets.
pub(crate) fn address_used_again(stage: &mut Stage<'_>) -> Attempt {
    let lab = stage.lab;
    let first = lab.unpublished_pod(PodSpec::new("shop", "leaving").role(Cast::ROLE)).unwrap();
    lab.publish(&first);
    if stage.state.serves() {
        eventually("the first pod gets nothing", || stage.ask(&first).status == Some(200));
    }
    let (v4, v6) = (first.v4(), first.v6());
    drop(first);
    lab.kubernetes.stall_watches(true);
    let spec = PodSpec::new("shop", "coming").role(Cast::THIEFS_ROLE).addresses(v4, v6);
    let second = lab.node.pod(lab.schedule(spec).unwrap()).unwrap();
    let attempt = stage.ask(&second);
    lab.kubernetes.stall_watches(false);
    lab.kubernetes.delete_pod("shop", "leaving");
    lab.delete(second);
    attempt
}

/// What a pod gets while another holds as many connections as it can.
pub(crate) fn flooded(stage: &mut Stage<'_>) -> Attempt {
    let flood = stage.attempt(Who::Thief, Attack::Hold { to: IMDS, count: FLOOD }, 1000);
    let attempt = stage.ask(&stage.cast.pod);
    stage.attempt(Who::Thief, Attack::Release, 1000);
    assert!(flood.error.is_none() || !stage.state.serves(), "no flood: {flood:?}");
    attempt
}
