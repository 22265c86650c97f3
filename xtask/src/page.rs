//! Tables of Markdown, and the pages that commands write them into.

use std::{fs, ops::Range};

use anyhow::{Context, Result};

use crate::command::workspace;

/// Ends what a command has written into a page; it begins with a line that names the command.
const END: &str = "<!-- end -->\n";

/// A table whose columns `words` are words, and the others numbers.
pub fn table(
    head: &[&str],
    words: Range<usize>,
    rows: impl IntoIterator<Item = Vec<String>>,
) -> String {
    let align = (0..head.len()).map(|column| if words.contains(&column) { "---" } else { "--:" });
    let align: Vec<&str> = align.collect();
    let mut text = format!("| {} |\n| {} |\n", head.join(" | "), align.join(" | "));
    rows.into_iter().for_each(|row| text.push_str(&format!("| {} |\n", row.join(" | "))));
    text
}

/// Writes `content` into a page of the workspace, in the place of what this `command` wrote before.
pub fn write(page: &str, command: &str, content: &str) -> Result<()> {
    let path = workspace().join(page);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {page}"))?;
    let text = replaced(&text, command, content);
    let text = text.with_context(|| format!("{page} has no place for what {command} writes"))?;
    fs::write(&path, text).with_context(|| format!("writing {page}"))
}

/// What this `command` wrote before into a page of the workspace.
pub fn written(page: &str, command: &str) -> Result<String> {
    let text = fs::read_to_string(workspace().join(page));
    let text = text.with_context(|| format!("reading {page}"))?;
    let place = place(&text, command);
    let (_, content, _) =
        place.with_context(|| format!("{page} has no place for what {command} writes"))?;
    Ok(content.trim().to_owned())
}

fn replaced(text: &str, command: &str, content: &str) -> Option<String> {
    let (before, _, after) = place(text, command)?;
    Some(format!("{before}\n{content}\n{END}{after}"))
}

/// The page's text before this command's part, the part, and the text after it.
fn place<'a>(text: &'a str, command: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let begin = format!("<!-- written by {command} -->\n");
    let start = text.find(&begin)? + begin.len();
    let (content, after) = text[start..].split_once(END)?;
    Some((&text[..start], content, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_numbers_to_the_right() {
        let row = || ["1", "a", "2"].map(str::to_owned).to_vec();
        let text = "| n | what | m |\n| --: | --- | --: |\n| 1 | a | 2 |\n| 1 | a | 2 |\n";
        assert_eq!(table(&["n", "what", "m"], 1..2, [row(), row()]), text);
    }

    #[test]
    fn content_goes_between_the_lines_of_its_command() {
        let (load, demo) = ("<!-- written by x --load -->\n", "<!-- written by x --demo -->\n");
        let text = format!("# Page\n\n{load}old\n{END}\nMore.\n{demo}x\n{END}");
        let wanted = format!("# Page\n\n{load}\n| new |\n\n{END}\nMore.\n{demo}x\n{END}");
        assert_eq!(replaced(&text, "x --load", "| new |\n"), Some(wanted));
        assert_eq!(replaced(&text, "x --tests", "| new |\n"), None);
        assert_eq!(place(&text, "x --load").map(|(_, content, _)| content), Some("old\n"));
    }
}
