//! Whether the links of the book lead somewhere: mdBook makes files and anchors by rules of its own.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use xtask::markdown::resolved;

/// The HTML files, by their paths in the book.
type Pages = BTreeMap<String, String>;

/// How many links within the book there are, and a line for each that leads nowhere.
pub(super) fn check(book: &Path) -> Result<(usize, Vec<String>)> {
    let mut pages = Pages::new();
    read(book, PathBuf::new(), &mut pages)?;
    let mut count = 0;
    let mut dead = Vec::new();
    for (path, html) in &pages {
        for link in attributes(html).filter(|link| !link.contains(':')) {
            count += 1;
            if !leads_somewhere(book, path, link, &pages) {
                dead.push(format!("{path}: the link to `{link}` leads nowhere"));
            }
        }
    }
    Ok((count, dead))
}

fn read(book: &Path, folder: PathBuf, pages: &mut Pages) -> Result<()> {
    for entry in fs::read_dir(book.join(&folder)).context("listing the book")? {
        let entry = entry.context("listing the book")?;
        let path = folder.join(entry.file_name());
        if entry.path().is_dir() {
            read(book, path, pages)?;
        } else if path.extension().is_some_and(|ending| ending == "html") {
            let html = fs::read_to_string(entry.path())
                .with_context(|| format!("cannot read {}", path.display()))?;
            pages.insert(path.to_string_lossy().into_owned(), html);
        }
    }
    Ok(())
}

/// What the page links to, or loads.
fn attributes(html: &str) -> impl Iterator<Item = &str> {
    [" href=\"", " src=\""]
        .into_iter()
        .flat_map(move |name| html.split(name).skip(1).filter_map(|rest| rest.split('"').next()))
}

fn leads_somewhere(book: &Path, path: &str, link: &str, pages: &Pages) -> bool {
    let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = resolved(path, file);
    if !book.join(&target).exists() {
        return false;
    }
    anchor.is_empty()
        || pages.get(&target).is_some_and(|html| html.contains(&format!(" id=\"{anchor}\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_link_of_the_book_is_found() {
        let book = tempfile::tempdir().unwrap();
        let page = |path: &str, html: &str| fs::write(book.path().join(path), html).unwrap();
        fs::create_dir(book.path().join("docs")).unwrap();
        page("a.html", r#"<h1 id="here">a</h1>"#);
        page("docs/b.html", r##"<a href="../a.html#here"></a><img src="../a.html"><a href="#x">"##);
        page("docs/c.html", r#"<a href="d.html"></a><a href="https://e.example/f"></a>"#);
        page("docs/e.html", r#"<a class="a" href="../a.html#there"></a>"#);
        let (count, dead) = check(book.path()).unwrap();
        let dead: Vec<_> = dead.iter().map(|line| line.split(" leads").next().unwrap()).collect();
        let wanted = [("docs/b.html", "#x"), ("docs/c.html", "d.html")];
        let wanted = wanted.map(|(page, link)| format!("{page}: the link to `{link}`"));
        assert_eq!(dead[..2], wanted);
        assert_eq!(dead[2], "docs/e.html: the link to `../a.html#there`");
        assert_eq!((count, dead.len()), (5, 3));
    }
}
