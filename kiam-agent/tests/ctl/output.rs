//! What is printed: on a terminal of 80 and of 200 columns, for programs, and in other's hands.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use lab::{
    eventually,
    pod_client::{Imds, Options, attempt},
};
use serde_json::Value;

use crate::stage::{CTL, Cluster, pod};

/// What a tenant can write into annotations and requests.
const HOSTILE: &str = "re\u{1b}[2Jader\u{9b}31m\u{202e}\u{7f}";

fn cluster() -> (Cluster, lab::loopback::LoopbackAgent) {
    let cluster = Cluster::start();
    cluster.namespace("shop", &[]);
    cluster.kubernetes.apply_pod(&pod("n1", "shop", "orders", 1).role("reader"));
    cluster.kubernetes.apply_pod(&pod("n1", "shop", "hostile", 2).role(HOSTILE));
    let agent = cluster.agent("n1", &[]);
    for number in [1, 2] {
        let _ = attempt(&Options {
            to: Some(agent.pods().ip()),
            port: agent.pods().port(),
            bind: Some([127, 77, 1, number].into()),
            imds: Imds::V1,
            ..Options::get("/latest/meta-data/iam/security-credentials/")
        });
    }
    eventually("the credentials", || {
        let pods = cluster.json(&["pods"]);
        pods["pods"].as_array().unwrap().iter().any(|pod| pod["served"] == true)
    });
    (cluster, agent)
}

/// Without what colours and clears.
fn plain(text: &str) -> String {
    let mut shown = String::new();
    let mut parts = text.split('\u{1b}');
    shown.push_str(parts.next().unwrap());
    for part in parts {
        let end = part.find(|c: char| c.is_ascii_alphabetic()).unwrap();
        shown.push_str(&part[end + 1..]);
    }
    shown
}

#[test]
fn tables_fit_the_terminal_and_nothing_that_tenants_write_drives_it() {
    let (cluster, _agent) = cluster();
    for columns in [80, 200] {
        for words in [&["status"][..], &["pods"], &["v1-users"]] {
            let text = cluster.on_terminal(columns, words);
            // Its own colours are all that there is.
            let colors = ["[0m", "[2m", "[31m", "[32m", "[33m"];
            let others = text.split('\u{1b}').skip(1);
            let obeyed: Vec<_> =
                others.filter(|it| !colors.iter().any(|color| it.starts_with(color))).collect();
            assert!(obeyed.is_empty(), "{words:?}: {obeyed:?}");
            assert!(text.contains("\u{1b}[2m"), "{words:?} has no colours:\n{text}");
            // For whoever reads it with --nocapture, and where it fails.
            println!("{columns} columns, {words:?}:\n{text}");
            let text = plain(&text);
            for line in text.lines() {
                assert!(line.chars().count() <= usize::from(columns), "{words:?}: {line:?}");
                assert!(!line.chars().any(char::is_control), "{line:?}");
                assert!(!line.contains('\u{202e}'), "{line:?}");
            }
        }
    }
    let piped = cluster.ctl(&["status"]);
    assert!(!piped.text.contains('\u{1b}') && piped.text.contains("VERSION"), "{piped:?}");
}

#[test]
fn programs_read_the_same_as_people() {
    let (cluster, _agent) = cluster();
    for words in [&["status"][..], &["pods"], &["v1-users"], &["explain", "shop/orders"]] {
        let [json, yaml] =
            ["json", "yaml"].map(|form| cluster.ctl(&[words, &["--output", form]].concat()).text);
        for text in [&json, &yaml] {
            assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{text}");
        }
        let json: Value = serde_json::from_str(&json).unwrap();
        let yaml: Value =
            serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
        // Seconds pass.
        assert_eq!(
            json.as_object().unwrap().keys().collect::<Vec<_>>(),
            yaml.as_object().unwrap().keys().collect::<Vec<_>>()
        );
    }
    let jq = |words: &[&str], query: &str| {
        let text = cluster.ctl(&[words, &["--output=json"]].concat()).text;
        let mut jq = Command::new("jq")
            .args(["--raw-output", query])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        jq.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        String::from_utf8(jq.wait_with_output().unwrap().stdout).unwrap()
    };
    assert_eq!(jq(&["status"], ".nodes[] | select(.status.ready) | .node"), "n1\n");
    assert_eq!(
        jq(&["pods"], ".pods[] | select(.served) | .role"),
        "arn:aws:iam::123456789012:role/reader\n"
    );
    assert_eq!(
        jq(&["v1-users"], ".pods[] | select(.name == \"orders\") | .imdsv1[].userAgent"),
        "kiam-lab\n"
    );
}

#[test]
fn pods_v1_users_refresh_logs_and_check_say_what_the_agents_know() {
    let (cluster, agent) = cluster();
    let said = cluster.ctl(&["pods"]);
    let row = said.text.lines().find(|line| line.starts_with("shop/orders")).unwrap();
    let words: Vec<_> = row.split_whitespace().collect();
    assert_eq!(words[1..4], ["served", "reader", "in"], "{row}");
    assert!(row.contains("s ago") && row.ends_with("n1"), "{row}");
    let said = cluster.ctl(&["v1-users"]);
    assert!(
        said.text.contains("shop/orders") && said.text.contains("once, by kiam-lab"),
        "{said:?}"
    );
    let before = cluster.sts.requests();
    let said = cluster.ctl(&["refresh", "shop/orders"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.text.starts_with("AWS issued credentials of arn:"), "{said:?}");
    assert!(cluster.sts.requests() > before);
    let said = cluster.ctl(&["refresh", "shop/hostile"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    let whole = cluster.ctl(&["logs", "n1"]);
    assert_eq!(whole.text.lines().count(), agent.log().lines().count(), "{whole:?}");
    let said = cluster.ctl(&["logs", "shop/orders"]);
    assert!(
        !said.text.is_empty() && said.text.lines().all(|line| line.contains("orders")),
        "{said:?}"
    );
    let said = cluster.ctl(&["check"]);
    // The agent of the lab intercepts nothing, which a warning says.
    assert!(said.text.contains("warn flags: n1"), "{said:?}");
    let completed = |words: &str| {
        let line = format!(
            "source /dev/stdin; COMP_WORDS=(kubectl-kiam {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
             _kubectl__kiam kubectl-kiam ${{COMP_WORDS[-1]}} ${{COMP_WORDS[-2]}}; echo ${{COMPREPLY[@]}}"
        );
        let mut bash = Command::new("bash");
        xtask::command::printed_for(
            bash.args(["-c", &line]),
            &cluster.ctl(&["completions", "bash"]).text,
        )
        .unwrap()
    };
    assert_eq!(completed("ex").trim(), "explain");
    assert_eq!(completed("status --no").trim(), "--node");
    assert_eq!(completed("v1-users --names").trim(), "--namespace");
    let manual = cluster.ctl(&["man"]).text;
    assert!(manual.contains(".TH kubectl") && manual.contains("previous container"), "{manual}");
    assert!(!manual.contains("status(1)"), "it names pages that nobody has: {manual}");
    assert_eq!(cluster.ctl(&["explain", "orders"]).code, Some(64));
}

#[test]
fn watching_goes_on_until_it_is_ended() {
    let (cluster, _agent) = cluster();
    let mut command = cluster.command(&["status", "--watch=100ms", "--output=json"]);
    let mut watching = command.stdout(Stdio::piped()).spawn().unwrap();
    let stdout = watching.stdout.take().unwrap();
    let values = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
    assert_eq!(values.take(3).filter(Result::is_ok).count(), 3);
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert!(std::path::Path::new(CTL).exists());
}
