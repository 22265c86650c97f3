//! `cargo xtask book`: the documents as one book, which a browser shows.
//!
//! The documents stay where a code host shows them. mdBook takes pages of one folder alone, so it gets a copy of each page at
//! the same place, in which only the links to what is no page differ.

mod links;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;

use super::image::emptied;
use xtask::{
    command::{command, output_of, run, say, workspace},
    markdown::{is_relative, links, resolved, with_links},
    toolchain,
};

/// What it writes has changed with versions.
const MDBOOK: &str = "0.5.4";
/// It draws the pictures that are text.
const MERMAID: &str = "12.3.0";
const SUMMARY: &str = "docs/SUMMARY.md";
const SETTINGS: &str = "xtask/book";
/// Links to these are pictures of the book.
const PICTURES: [&str; 2] = ["svg", "png"];

/// Builds the book, and fails if a link in it leads nowhere.
pub(crate) fn build() -> Result<()> {
    let mdbook = toolchain::ensure_program("mdbook", MDBOOK, "search")?;
    let mermaid = mermaid()?;
    let stage = emptied(workspace().join("target/tools/book"))?;
    let book = emptied(workspace().join("target/book"))?;
    for name in ["book.toml", "mermaid-init.js"] {
        copy(&workspace().join(SETTINGS).join(name), &stage.join(name))?;
    }
    let source = stage.join("src");
    copy(&mermaid, &source.join("mermaid.min.js"))?;
    lay_pages(&source)?;
    run(command(mdbook).arg("build").arg(&stage).arg("--dest-dir").arg(&book))?;
    let (count, dead) = links::check(&book)?;
    for link in &dead {
        say(link);
    }
    if !dead.is_empty() {
        bail!("book: {} of {count} links lead nowhere", dead.len());
    }
    say(format!("book: {count} links lead somewhere: {}", book.join("index.html").display()));
    Ok(())
}

/// Copies the pages of the summary, their pictures, and the summary.
fn lay_pages(source: &Path) -> Result<()> {
    let summary = read(SUMMARY)?;
    let pages: BTreeSet<String> =
        links(&summary).into_iter().map(|link| resolved(SUMMARY, link)).collect();
    let host = host();
    for path in &pages {
        let page = read(path)?;
        for link in links(&page).into_iter().filter(|link| is_relative(link)) {
            let target = resolved(path, link);
            if is_picture(&target) {
                copy(&workspace().join(&target), &source.join(&target))?;
            }
        }
        write(&source.join(path), &with_links(&page, |link| elsewhere(path, link, &pages, &host)))?;
    }
    let summary = with_links(&summary, |link| Some(resolved(SUMMARY, link)));
    write(&source.join("SUMMARY.md"), &summary)
}

/// Where a link of a page leads on the code host, if to no page or picture of the book.
fn elsewhere(path: &str, link: &str, pages: &BTreeSet<String>, host: &str) -> Option<String> {
    let target = resolved(path, link);
    let stays = !is_relative(link) || pages.contains(&target) || is_picture(&target);
    (!stays).then(|| format!("{host}/{target}"))
}

fn is_picture(path: &str) -> bool {
    Path::new(path).extension().is_some_and(|ending| PICTURES.iter().any(|it| ending == *it))
}

/// The repository's files as they are in this commit.
fn host() -> String {
    let commit = output_of(command("git").args(["rev-parse", "HEAD"]));
    let commit = commit.unwrap_or_else(|| "HEAD".to_owned());
    format!("{}/blob/{commit}", env!("CARGO_PKG_REPOSITORY"))
}

/// Mermaid's program for browsers, which is one file of its package.
fn mermaid() -> Result<PathBuf> {
    let folder = workspace().join("target/tools/mermaid");
    let program = folder.join(format!("{MERMAID}.min.js"));
    if program.exists() {
        return Ok(program);
    }
    toolchain::ensure_npm()?;
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let mut pack = command("npm");
    pack.args(["pack", "--silent", "--pack-destination"]).arg(&folder);
    run(pack.arg(format!("mermaid@{MERMAID}")))?;
    let package = folder.join(format!("mermaid-{MERMAID}.tgz"));
    let file =
        File::open(&package).with_context(|| format!("cannot open {}", package.display()))?;
    let mut archive = tar::Archive::new(GzDecoder::new(file));
    for entry in archive.entries().context("reading the package")? {
        let mut entry = entry.context("reading the package")?;
        if entry.path().context("reading the package")? == Path::new("package/dist/mermaid.min.js")
        {
            // Whole, or not there: the next run takes it for whole.
            let part = folder.join("part");
            let mut out = File::create(&part).context("writing Mermaid")?;
            io::copy(&mut entry, &mut out).context("writing Mermaid")?;
            fs::rename(&part, &program).context("writing Mermaid")?;
            return Ok(program);
        }
    }
    bail!("{} has no dist/mermaid.min.js", package.display())
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(workspace().join(path)).with_context(|| format!("cannot read {path}"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    ensure_parent(path)?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    ensure_parent(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display())).map(drop)
}

fn ensure_parent(path: &Path) -> Result<()> {
    let folder = path.parent().context("a file is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_what_the_book_lacks_lead_to_the_code_host() {
        let pages = BTreeSet::from(["README.md".to_owned(), "docs/a.md".to_owned()]);
        for (link, wanted) in [
            ("a.md#part", None),
            ("#part", None),
            ("../README.md", None),
            ("images/a.svg", None),
            ("https://example.com/", None),
            ("../LICENSE", Some("host/LICENSE")),
            ("../deploy/", Some("host/deploy")),
        ] {
            let found = elsewhere("docs/a.md", link, &pages, "host");
            assert_eq!(found.as_deref(), wanted, "{link}");
        }
    }
}
