//! `docs/migrating.md` shows what the command prints.

use std::{fs, path::Path};

use super::printed;

/// Stands for lines that the page leaves out.
const LEFT_OUT: &str = "...";

#[test]
fn the_page_shows_what_the_command_prints() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/migrating.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, block) = page.split_once("```text\n$ kiam-agent migrate kube2iam.yaml\n").unwrap();
    let (block, _) = block.split_once("```\n").unwrap();
    let (text, status) = printed(&["kube2iam/plain.yaml"]);
    assert_eq!(status, 0);
    let mut printed = text.lines();
    let mut skips = false;
    for line in block.lines() {
        if line == LEFT_OUT {
            skips = true;
        } else if skips {
            assert!(printed.any(|other| other == line), "not printed, or not there: {line}");
            skips = false;
        } else {
            assert_eq!(printed.next(), Some(line));
        }
    }
    assert_eq!(printed.next(), None, "the page ends where the command does");
}
