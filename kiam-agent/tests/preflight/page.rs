//! `docs/preflight.md` has the checks of the program, and `docs/installing.md` what it prints.

use std::{fs, path::Path};

use kiam_core::preflight::Topic;
use lab::{AGENT_PORT, Lab, NODE_V4, fake::Injected, role_arn};

/// Stands for lines that the page leaves out.
const LEFT_OUT: &str = "...";

fn page(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap()
}

#[test]
fn the_page_lists_the_checks_and_what_each_looks_at() {
    let page = page("docs/preflight.md");
    let rows = page.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((name, rest.split(" | ").next()?))
    });
    let rows = rows.filter(|(name, _)| !name.starts_with("--"));
    let all: Vec<_> = Topic::ALL.iter().map(|topic| (topic.name(), topic.about())).collect();
    assert_eq!(rows.collect::<Vec<_>>(), all);
}

/// A line without numbers, which differ from run to run, and without the spaces that align it.
fn comparable(line: &str) -> String {
    let numbers = line.replace(|c: char| c.is_ascii_digit(), "#");
    let mut words: Vec<_> = numbers.split_whitespace().map(str::to_owned).collect();
    for word in &mut words {
        while word.contains("##") {
            *word = word.replace("##", "#");
        }
    }
    words.join(" ")
}

/// The page's excerpt of a report: its block of `text` that begins with the command.
fn excerpt() -> Vec<String> {
    let page = page("docs/installing.md");
    let blocks = page.split("```text\n").skip(1).filter_map(|rest| rest.split("```").next());
    let mut blocks = blocks.filter(|block| block.starts_with("$ kiam-agent preflight"));
    let block = blocks.next().expect("the page has a report");
    // The command may go on in a second line.
    let report = block.lines().skip_while(|line| line.starts_with('$') || line.ends_with('\\'));
    let report = report.skip_while(|line| line.trim_start().starts_with("--"));
    report.filter(|line| !line.is_empty() && *line != LEFT_OUT).map(comparable).collect()
}

/// A node where kiam runs, whose instance is as open as EC2 once made them, and where a role does not trust the node.
#[test]
fn installing_page_shows_what_preflight_prints() {
    let Some(lab) = lab::node_test!() else { return };
    let kiam = lab.node.netns().listen((NODE_V4, AGENT_PORT).into()).unwrap();
    let mut iptables = lab.node.netns().command("iptables-nft");
    iptables.args(["-t", "nat", "-A", "PREROUTING", "-d", "169.254.169.254/32", "-i", "eni+"]);
    iptables.args(["-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination"]);
    assert!(iptables.arg("10.77.0.1:3100").status().unwrap().success());
    let denied = Injected::refuse(403, "AccessDenied").field("RoleArn", &role_arn("orders"));
    lab.sts.faults().inject(denied);
    let _pods = ["orders", "bills"].map(|role| lab.pod_of(role));
    let printed = report(&lab);
    drop(kiam);
    let mut rest = printed.lines().map(comparable);
    let excerpt = excerpt();
    assert!(excerpt.len() > 20, "{excerpt:?}");
    for line in &excerpt {
        assert!(rest.any(|printed| printed == *line), "no {line:?} in\n{printed}");
    }
}

/// What a terminal of 80 columns shows.
fn report(lab: &Lab) -> String {
    let output = lab.preflight(&[], &[], &[]).unwrap().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stdout).unwrap()
}
