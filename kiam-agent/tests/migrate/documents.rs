//! `docs/migrating.md` shows what the program prints, and names every flag.

use kiam_agent::peers::{FLAGS, Fate};

use super::printed;

fn page() -> String {
    std::fs::read_to_string(xtask::command::workspace().join("docs/migrating.md")).unwrap()
}

/// The blocks of the page that begin with a command of this program, as the command and what it prints.
fn transcripts() -> Vec<(String, String)> {
    let page = page();
    let blocks = page.split("```console\n").skip(1).filter_map(|rest| rest.split("```").next());
    let commands = blocks.filter_map(|block| {
        let (command, output) = block.split_once('\n')?;
        Some((command.strip_prefix("$ kiam-agent migrate ")?.to_owned(), output.to_owned()))
    });
    commands.collect()
}

#[test]
fn the_page_shows_what_the_program_prints() {
    let transcripts = transcripts();
    assert!(!transcripts.is_empty());
    for (command, output) in transcripts {
        let words: Vec<&str> = command.split_whitespace().collect();
        let (text, status) = printed(&words);
        assert_eq!(text, output, "$ kiam-agent migrate {command}");
        assert_eq!(status, 2, "{command}");
    }
}

#[test]
fn the_page_names_every_flag_of_theirs() {
    let page = page();
    for flag in &FLAGS {
        let name = format!("`--{}", flag.name);
        let family = format!("`--{}*`", flag.name.split_inclusive('-').take(2).collect::<String>());
        let is_named = page.match_indices(&name).any(|(at, _)| {
            let next = page[at + name.len()..].chars().next();
            next.is_some_and(|c| "`=".contains(c))
        });
        // `--version` only prints, in all programs.
        let is_there = is_named || page.contains(&family) || flag.name == "version";
        assert!(is_there, "docs/migrating.md does not name --{}", flag.name);
        if let Fate::Renamed(to) = flag.fate {
            assert!(page.contains(&format!("`--{to}")), "docs/migrating.md does not name --{to}");
        }
    }
}

/// The reasons of the page are the program's: its policy's, or of the examples of `docs/policy.md`, which are compared too.
#[test]
fn the_page_shows_reasons_that_the_agent_gives() {
    let page = page();
    let (_, table) = page.split_once("| reason | after a change it means |").unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let reasons: Vec<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
    assert!(reasons.len() > 3, "{reasons:?}");
    let read = |path| std::fs::read_to_string(xtask::command::workspace().join(path)).unwrap();
    let known = read("kiam-agent/core/src/policy/refusal.rs") + &read("docs/policy.md");
    for reason in reasons {
        assert!(known.contains(reason), "docs/migrating.md: no agent says {reason:?}");
    }
}
