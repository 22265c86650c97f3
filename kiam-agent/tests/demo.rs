//! The demo's claims are true, and the README shows what the demo prints.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::Command,
};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
/// Stands for lines that the README leaves out.
const LEFT_OUT: &str = "...";

/// The README's excerpt: the lines of its only block of `text`.
fn excerpt() -> Vec<String> {
    let readme = fs::read_to_string(README).expect("the README can be read");
    let mut blocks = readme.split("```text\n").skip(1).filter_map(|rest| rest.split("```").next());
    let block = blocks.next().expect("the README has a block of text");
    assert_eq!(blocks.next(), None, "the README has one block of text");
    block.lines().filter(|line| *line != LEFT_OUT).map(comparable).collect()
}

/// A line without what differs from run to run: numbers but 0, and the spaces that align them.
fn comparable(line: &str) -> String {
    let mut text = String::new();
    let mut number = String::new();
    for c in line.chars().chain(['\n']) {
        if c.is_ascii_digit() || c == '.' {
            number.push(c);
            continue;
        }
        if !number.is_empty() {
            text.push_str(if number == "0" { "0" } else { "#" });
            number.clear();
        }
        text.push(c);
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The first line that is not among the rest of what was `printed`, in this order.
fn missing<'a>(lines: &'a [String], printed: &[String]) -> Option<&'a String> {
    let mut printed = printed.iter();
    lines.iter().find(|line| !printed.any(|printed| printed == *line))
}

#[test]
fn line_that_is_not_printed_or_stands_elsewhere_is_found() {
    let of = |lines: &[&str]| -> Vec<String> { lines.iter().copied().map(comparable).collect() };
    let printed = of(&["1. One", "   asked 29 times  ok", "   0 packets  ok", "2. Two"]);
    for (lines, absent) in [
        (of(&["1. One", "asked 131 times ok", "2. Two"]), None),
        (of(&["1. One", "3 packets ok"]), Some("# packets ok")),
        (of(&["1. One", "asked 29 times FALSE"]), Some("asked # times FALSE")),
        (of(&["2. Two", "1. One"]), Some("# One")),
    ] {
        assert_eq!(missing(&lines, &printed).map(String::as_str), absent, "{lines:?}");
    }
}

/// Runs the lab's demo of the built agent by `command`; what it printed, and all that it said if it failed.
fn demo(mut command: Command) -> (String, String) {
    let run = command.output().expect("the demo can be run");
    let printed = String::from_utf8_lossy(&run.stdout).into_owned();
    let said = format!("{printed}\n{}", String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{said}");
    (printed, said)
}

#[test]
fn readme_shows_what_the_demo_prints() {
    if lab::skip!() {
        return;
    }
    let mut command = Command::new(Path::new(AGENT).with_file_name("lab"));
    command.args(["demo", "--agent", AGENT]);
    let (printed, said) = demo(command);
    let printed: Vec<String> = printed.lines().map(comparable).collect();
    let excerpt = excerpt();
    assert!(excerpt.len() > 10, "{excerpt:?}");
    assert_eq!(missing(&excerpt, &printed), None, "{said}");
}

/// The first thing that a visitor of the README runs, as a user without any rights.
#[test]
fn the_demo_without_root_needs_none() {
    const NOBODY: u32 = 65534;
    let readme = fs::read_to_string(README).expect("the README can be read");
    assert!(readme.contains("\ncargo xtask demo --rootless\n"), "the README names it");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(folder.path(), open).expect("it is ours");
    // Where cargo built them, others may have no way in.
    let copy = |program: &str| {
        let to = folder.path().join(program);
        fs::copy(Path::new(AGENT).with_file_name(program), &to).expect("it can be copied");
        to
    };
    let agent = copy("kiam-agent");
    let mut command = Command::new(copy("lab"));
    command.args(["demo", "--rootless", "--agent"]).arg(agent).current_dir("/").env_clear();
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let (printed, said) = demo(command);
    assert!(printed.contains("Verdict: all of it is true"), "{said}");
}
