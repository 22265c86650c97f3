//! The whole agent on a lab node when things go wrong: it dies, its neighbours do, it is taken away.

use std::{thread, time::Duration};

use lab::{
    Lab, Refusal, eventually,
    fake::kubernetes::{Gone, Resource},
    pod_client::Options,
};

const READY_LIMIT: Duration = Duration::from_secs(120);

#[test]
fn kill_9_under_load_lets_nothing_through() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pods = ["orders", "reports"].map(|role| (role, lab.pod_of(role)));
    for (role, pod) in &pods {
        lab.assert_served(pod, role);
    }
    let asking = Options { pause_ms: 20, ..Options::default() };
    let asked = pods.each_ref().map(|(role, pod)| (*role, pod.ask_meanwhile(&asking).unwrap()));
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(200));
        agent.kill().unwrap();
        thread::sleep(Duration::from_millis(200));
        agent = lab.agent(&[]);
    }
    for (role, asked) in asked {
        let attempts = asked.finish().unwrap();
        let (answered, cut): (Vec<_>, Vec<_>) =
            attempts.iter().partition(|attempt| attempt.error.is_none());
        assert!(!cut.is_empty(), "{role} noticed nothing in {} attempts", attempts.len());
        for attempt in answered {
            lab.assert_role(attempt, role);
        }
        for attempt in cut {
            let error = attempt.error.as_deref().unwrap();
            let known = ["ECONNREFUSED", "ECONNRESET", "EPIPE", "EOF", "EPERM"];
            assert!(known.contains(&error), "{attempt:?}");
        }
    }
    for (role, pod) in &pods {
        lab.assert_served(pod, role);
        lab.assert_no_packets(&[pod]);
    }
}

/// As on a node where others of the same user have all the instances that it may have.
#[test]
fn an_agent_without_inotify_serves_pods_and_shows_that_until_there_is_one() {
    if lab::skip!() {
        return;
    }
    let refused = || {
        let lab = Lab::start().unwrap();
        let refusal = Refusal::of(libc::SYS_inotify_init1, libc::EMFILE).unwrap();
        let mut agent = lab.begin_agent(&[]);
        agent.wait_said("Listening", READY_LIMIT).unwrap();
        let pod = lab.pod_of("orders");
        let serves = || pod.credentials().is_ok_and(|attempt| attempt.status == Some(200));
        eventually("credentials", serves);
        lab.assert_served(&pod, "orders");
        eventually("nothing else is pending", || {
            let reply = agent.admin("/ready").unwrap();
            let lines = reply.body.lines().filter(|line| line.starts_with("pending: "));
            let told = "pending: watches of pods' cgroups (fs.inotify limits)";
            reply.status == 503 && lines.eq([told])
        });
        assert!(agent.metrics().contains("\nkiam_sandboxes_unwatched "));
        assert!(agent.said("fs.inotify.max_user_instances"), "{}", agent.log());
        refusal.lift();
        agent.wait_ready(READY_LIMIT).unwrap();
        agent.wait_said("All pods' cgroups are watched again", READY_LIMIT).unwrap();
        let metrics = agent.metrics();
        assert!(metrics.contains("\nkiam_sandboxes_unwatched 0\n"), "{metrics}");
        lab.assert_no_packets(&[&pod]);
    };
    // The filter of system calls stays with its thread.
    thread::spawn(refused).join().unwrap();
}

#[test]
fn an_agent_that_hangs_is_denied_at_once_after_its_lease() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = lab.served_pod("orders");
    agent.freeze().unwrap();
    let impatient = Options { timeout_ms: 300, ..Options::default() };
    eventually("the kernel still redirects to an agent that hangs", || {
        let attempt = pod.ask_once(&impatient).unwrap();
        assert_ne!(attempt.status, Some(200), "{attempt:?}");
        attempt.error.as_deref() == Some("EPERM")
    });
    agent.thaw().unwrap();
    eventually("the agent is denied though it goes on", || {
        pod.credentials().unwrap().status == Some(200)
    });
    lab.assert_served(&pod, "orders");
    lab.assert_no_packets(&[&pod]);
}

#[test]
fn pods_are_denied_before_the_api_server_has_answered_at_all() {
    let Some(lab) = lab::node_test!() else { return };
    lab.kubernetes.stop();
    let pod = lab.pod_of("orders");
    let mut agent = lab.begin_agent(&[]);
    // On a node that no agent has run on before.
    eventually("the pod reaches the real metadata service", || {
        let attempt = pod.credentials().unwrap();
        attempt.error.as_deref() == Some("EPERM")
    });
    assert!(!agent.said("Serving before pods and credentials are known"), "{}", agent.log());
    let packets = || pod.ips().map(|address| lab.imds.packets().get(&address).copied());
    let before = packets();
    lab.kubernetes.restart().unwrap();
    agent.wait_ready(READY_LIMIT).unwrap();
    lab.assert_served(&pod, "orders");
    assert_eq!(packets(), before);
}

#[test]
fn known_pods_are_served_while_the_api_server_is_away() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let known = lab.served_pod("orders");
    lab.kubernetes.stop();
    let unknown = lab.pod_of("reports");
    for _ in 0..3 {
        lab.assert_served(&known, "orders");
    }
    assert_eq!(unknown.credentials().unwrap().status, Some(404));
    lab.kubernetes.restart().unwrap();
    lab.eventually_served(&unknown, "reports");
    lab.assert_no_packets(&[&unknown]);
}

#[test]
fn a_watch_that_is_too_old_is_replaced_by_a_list() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    for (gone, role) in [(Gone::Event, "orders"), (Gone::Status, "reports")] {
        let lists = lab.kubernetes.lists(Resource::Pods);
        lab.kubernetes.say_gone_as(gone);
        // What happens while nobody listens is forgotten at once.
        lab.kubernetes.stop();
        let pod = lab.pod_of(role);
        lab.kubernetes.compact();
        lab.kubernetes.restart().unwrap();
        lab.eventually_served(&pod, role);
        assert!(lab.kubernetes.lists(Resource::Pods) > lists, "{gone:?}");
    }
}

#[test]
fn credentials_outlive_sts() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    let known = lab.served_pod("orders");
    lab.sts.stop();
    let unknown = lab.pod_of("reports");
    lab.assert_served(&known, "orders");
    let attempt = unknown.credentials().unwrap();
    assert_eq!((attempt.status, attempt.body.as_str()), (Some(503), ""), "{attempt:?}");
    lab.sts.restart().unwrap();
    lab.eventually_served(&unknown, "reports");
}
