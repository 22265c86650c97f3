//! Processes that end, rename themselves, or call themselves what they like.

use std::{os::unix::fs::symlink, process::Stdio};

use lab::{
    Cgroup, READY_LIMIT,
    pod_client::{Imds, Options},
};
use serde_json::Value;

use super::{key_of, line_of, lines, of_pod, request, run};

#[test]
fn a_hand_out_names_process_container_key_and_session_and_no_secret() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = lab.pod_of("orders");
    let attempt = pod.ask_once(&Options { imds: Imds::V1, ..Options::default() }).unwrap();
    let line = line_of(|| agent.log(), &pod);
    assert_eq!(line["access_key_id"], key_of(&attempt));
    assert_eq!(line["role"], lab::role_arn("orders"));
    assert_eq!((&line["session_name"], &line["imds"]), (&"kiam-kiam".into(), &"v1".into()));
    assert_eq!(line["user_agent"], "kiam-lab");
    assert_eq!((&line["count"], &line["coalesced"]), (&1.into(), &false.into()));
    assert_eq!(line["pod"]["name"], pod.spec().name);
    assert_eq!(
        line["expires"].as_str().map(|it| &it[..19]),
        attempt.field("Expiration").as_deref().map(|it| &it[..19])
    );
    let cgroup = pod.cgroup().path().to_string_lossy().into_owned();
    let container = line["container"].as_str().unwrap();
    assert!(container.len() == 32 && cgroup.contains(container), "{container} {cgroup}");
    let process = &line["process"];
    assert_eq!((&process["comm"], &process["thread"]), (&"lab".into(), &process["pid"]));
    // The client has ended by now or it has not: it is never another program.
    match process["executable_state"].as_str().unwrap() {
        "running" => assert!(process["executable"].as_str().unwrap().ends_with("/lab")),
        state => assert_eq!((state, &process["executable"]), ("gone", &Value::Null)),
    }
    for secret in ["SecretAccessKey", "Token"] {
        let secret = attempt.field(secret).unwrap();
        assert!(!agent.log().contains(&secret), "a secret is in the log");
    }
}

#[test]
fn the_name_at_connect_counts_and_any_name_is_one_line() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = lab.pod_of("orders");
    let agents = "User-Agent: \\\"}\\t{\\\"audit\\\":\\\"credentials\\\"}\\xff\\r\\n";
    let script = format!(
        "exec 3<>/dev/tcp/169.254.169.254/80 || exit\n\
         printf renamed > /proc/$$/comm\n\
         printf '{}' >&3\n\
         cat <&3",
        request("orders", agents)
    );
    // The kernel names a process by the file that it runs.
    let evil = lab.node.folder().join("\"}\n\u{1b}[2J");
    symlink("/bin/bash", &evil).unwrap();
    let output = pod.command(&evil).unwrap().args(["-c", &script]).stdin(Stdio::null()).output();
    let answer = String::from_utf8_lossy(&output.unwrap().stdout).into_owned();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let line = line_of(|| agent.log(), &pod);
    assert_eq!(line["process"]["comm"], "\\\"}\\n\\x1b[2J");
    assert_eq!(line["process"]["executable_state"], "changed");
    assert!(line["process"]["executable"].as_str().unwrap().ends_with("/bash"), "{line}");
    assert_eq!(line["user_agent"], r#"\"}\t{\"audit\":\"credentials\"}\xff"#);
    assert_eq!(of_pod(&lines(&agent.log()), &pod).len(), 1, "no name makes a second line");
    let raw = agent.log();
    let raw = raw.lines().find(|line| line.starts_with("{\"audit\"")).unwrap();
    assert!(raw.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{raw:?}");
}

#[test]
fn a_process_that_has_ended_is_gone_and_no_other_is_named() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = super::served(&lab, "orders");
    agent.freeze().unwrap();
    // Its child has the connection when the agent accepts it.
    let script = format!(
        "printf quitter > /proc/$$/comm\n\
         exec 3<>/dev/tcp/169.254.169.254/80 || exit\n\
         printf '{}' >&3\n\
         sleep 1000 >/dev/null 2>&1 & echo $$",
        request("orders", "")
    );
    let mut command = pod.command("bash").unwrap();
    let child = command.args(["-c", &script]).stdin(Stdio::null()).output().unwrap();
    agent.thaw().unwrap();
    let pid: u32 = String::from_utf8(child.stdout).unwrap().trim().parse().unwrap();
    let found = || {
        let mut all = of_pod(&lines(&agent.log()), &pod);
        let at = all.iter().position(|line| line["process"]["comm"] == "quitter")?;
        Some(all.swap_remove(at))
    };
    lab::eventually("there is a line", || found().is_some());
    let line = found().unwrap();
    let process = &line["process"];
    assert_eq!(process["pid"], pid);
    assert_eq!(
        (&process["executable"], &process["executable_state"], &line["parent"]),
        (&Value::Null, &"gone".into(), &Value::Null)
    );
}

#[test]
fn a_container_of_a_strange_name_is_escaped_and_what_it_makes_below_is_not_its_name() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = super::served(&lab, "orders");
    let strange = Cgroup::create(pod.slice().path().join("evil\u{1b}[2J\"}{")).unwrap();
    let victim = format!("cri-containerd-{}.scope", "f".repeat(64));
    let below = Cgroup::create(pod.cgroup().path().join(victim)).unwrap();
    let own = line_of(|| agent.log(), &pod)["container"].clone();
    for (cgroup, expected) in [(&strange, Value::from(r#"evil\x1b[2J\"}{"#)), (&below, own)] {
        let seen = of_pod(&lines(&agent.log()), &pod).len();
        assert!(seen > 0);
        key_of(&pod.ask_in(cgroup, &Options::default()).unwrap());
        lab::eventually("there is a line", || of_pod(&lines(&agent.log()), &pod).len() > seen);
        assert_eq!(of_pod(&lines(&agent.log()), &pod)[seen]["container"], expected);
    }
}

/// A pod's user can fill the memory that the kernel grants a socket, so that it has no room for one more record.
#[test]
fn no_connection_is_served_without_a_record_of_its_process() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = super::served(&lab, "orders");
    let connects = |size: u16| {
        let options = Options { filter: Some(size), ..Options::connect() };
        pod.ask_once(&options).unwrap().error.is_none()
    };
    let (mut fits, mut large) = (0, u16::MAX / 32);
    assert!(connects(0) && !connects(large * 32));
    while large - fits > 1 {
        let middle = fits.midpoint(large);
        *if connects(middle * 32) { &mut fits } else { &mut large } = middle;
    }
    let largest = (fits * 32..fits * 32 + 32).rev().find(|size| connects(*size)).unwrap();
    let options = Options { filter: Some(largest), imds: Imds::V1, ..Options::default() };
    let seen = of_pod(&lines(&agent.log()), &pod).len();
    key_of(&pod.ask_once(&options).unwrap());
    lab::eventually("there is a line", || of_pod(&lines(&agent.log()), &pod).len() > seen);
    let line = of_pod(&lines(&agent.log()), &pod).swap_remove(seen);
    assert_eq!(line["process"]["comm"], "lab", "size {largest}: {line}");
}

#[test]
fn shells_and_what_they_start_are_reported_and_served() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = super::served(&lab, "orders");
    let unusual = || agent.metric("kiam_audit_unusual_total{reason=\"Shell\"}");
    assert_eq!(unusual(), 0, "the client of the lab is no shell");
    let url = "http://169.254.169.254/latest/meta-data/iam/security-credentials/orders";
    // So often that it still runs when it is looked at: of a process that has ended nobody knows who started it.
    let answer = run(&pod, &format!("curl --silent '{url}?[1-300]'; true"));
    assert!(answer.contains("AccessKeyId"), "{answer}");
    lab::eventually("it is counted", || unusual() == 1);
    let shown = of_pod(&lines(&agent.log()), &pod);
    let line = shown.iter().find(|line| line["process"]["comm"] == "curl").unwrap();
    assert_eq!(line["unusual"], Value::from(vec!["shell"]), "{line}");
    assert!(agent.log().lines().any(|line| {
        line.contains("Unusual process got credentials")
            && line.contains(&format!("pod.name=\"{}\"", pod.spec().name))
            && line.contains("process.comm=\"curl\"")
    }));
}

#[test]
fn pods_of_the_node_listener_are_named_too() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.begin_agent(&["--path=node"]);
    agent.wait_ready(READY_LIMIT).unwrap();
    let pod = lab.pod_of("orders");
    lab.assert_served(&pod, "orders");
    let line = line_of(|| agent.log(), &pod);
    assert_eq!((&line["path"], &line["imds"]), (&"node".into(), &"v2".into()));
    assert_eq!(line["process"]["comm"], "lab");
    drop(agent);
    let agent = lab.agent(&["--audit=off"]);
    lab.assert_served(&pod, "orders");
    assert_eq!(lines(&agent.log()), Vec::<Value>::new());
}
