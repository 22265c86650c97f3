//! What a guest has: programs, the libraries of these, modules, jobs.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::{architecture::Architecture, debian::Kernel, job::Job};
use xtask::command::{command, output_of};

/// Modules are in it, named in the order to load them.
pub(super) const MODULES: &str = "/modules";
/// What the guest does.
pub(super) const JOBS: &str = "/jobs";

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive in the format of `cpio -H newc`, which the kernel unpacks.
struct Archive<W> {
    to: W,
    folders: BTreeSet<PathBuf>,
    count: u32,
}

// === impl Archive ===

impl<W: Write> Archive<W> {
    fn new(to: W) -> Self {
        Self { to, folders: BTreeSet::new(), count: 0 }
    }

    /// A file, and the folders that it is in.
    fn file(&mut self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
        above.reverse();
        // Without the root.
        for folder in above.into_iter().skip(1) {
            if self.folders.insert(folder.to_owned()) {
                self.entry(&folder.to_string_lossy(), FOLDER, &[])?;
            }
        }
        self.entry(&path.to_string_lossy(), PROGRAM, content)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let name = path.trim_start_matches('/');
        let too_long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let (length, named) = (u32::try_from(content.len()), u32::try_from(name.len() + 1));
        let (length, named) = (length.map_err(too_long)?, named.map_err(too_long)?);
        self.count += 1;
        // Inode, mode, owner, group, links, time, length, four numbers of devices, length of the name, no checksum.
        let fields = [self.count, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, named, 0];
        let mut head = String::from("070701");
        head.extend(fields.map(|field| format!("{field:08X}")));
        let head = [head.as_bytes(), name.as_bytes(), b"\0"].concat();
        for part in [head.as_slice(), content] {
            self.to.write_all(part)?;
            self.to.write_all(&[0; 3][..part.len().next_multiple_of(4) - part.len()])?;
        }
        Ok(())
    }

    fn end(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }
}

/// Programs and files for guests of one architecture.
#[derive(Debug)]
pub(super) struct Userland {
    pub(super) architecture: Architecture,
    /// The folder that has `lib` and `usr`; `/` for this machine's own.
    pub(super) root: PathBuf,
    /// Where each comes from, and its path in the guest; with these come their libraries.
    pub(super) programs: Vec<(PathBuf, PathBuf)>,
    /// The same of what is no program.
    pub(super) files: Vec<(PathBuf, PathBuf)>,
}

// === impl Userland ===

impl Userland {
    /// The archive for one kernel, with what was `compiled` at the same paths as here: tests know the agent by the path that
    /// cargo gave it.
    pub(super) fn archive(
        &self,
        kernel: &Kernel,
        compiled: &[&Path],
        jobs: &[Job],
    ) -> Result<NamedTempFile> {
        let image = NamedTempFile::new().context("making a file for the initramfs")?;
        let mut archive = Archive::new(BufWriter::new(image.reopen().context("opening it")?));
        let mut libraries = BTreeSet::new();
        let compiled = compiled.iter().map(|&path| (path, path));
        let tools = self.programs.iter().map(|(from, to)| (from.as_path(), to.as_path()));
        for (from, to) in compiled.chain(tools) {
            self.libraries_of(from, &mut libraries)?;
            archive.file(to, &self.stripped(from)?).context("writing the initramfs")?;
        }
        let modules = kernel.modules.iter().zip(1..);
        let modules =
            modules.map(|(path, number)| (path.clone(), format!("{MODULES}/{number}.ko").into()));
        let libraries = libraries.into_iter().map(|path| (self.root.join(&path), path));
        for (from, to) in modules.chain(libraries).chain(self.files.iter().cloned()) {
            let content = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
            archive.file(&to, &content).context("writing the initramfs")?;
        }
        let jobs = serde_json::to_vec(jobs).context("writing the jobs")?;
        archive.file(Path::new(JOBS), &jobs).context("writing the initramfs")?;
        archive.end().context("writing the initramfs")?;
        Ok(image)
    }

    /// Adds the loader of a program, its shared libraries and theirs, by their paths below the root.
    fn libraries_of(&self, program: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
        let listed = output_of(command("readelf").args(["-W", "-l", "-d"]).arg(program));
        let listed = listed.with_context(|| format!("readelf can't read {}", program.display()))?;
        for line in listed.lines() {
            let loader = between(line, "[Requesting program interpreter: ");
            let library = between(line, "Shared library: [");
            let path = match (loader, library) {
                (Some(loader), _) => PathBuf::from(loader.trim_start_matches('/')),
                (_, Some(library)) => self
                    .library(library)
                    .with_context(|| format!("{} needs {library}", program.display()))?,
                _ => continue,
            };
            if found.insert(path.clone()) {
                self.libraries_of(&self.root.join(path), found)?;
            }
        }
        Ok(())
    }

    fn library(&self, name: &str) -> Option<PathBuf> {
        let folders =
            ["lib", "usr/lib"].map(|folder| Path::new(folder).join(self.architecture.libraries()));
        folders
            .map(|folder| folder.join(name))
            .into_iter()
            .find(|path| self.root.join(path).exists())
    }

    /// The program without what only a debugger reads.
    fn stripped(&self, program: &Path) -> Result<Vec<u8>> {
        let to = NamedTempFile::new().context("making a file for a stripped program")?;
        let strip = format!("{}-strip", self.architecture.libraries());
        let stripped = output_of(command(&strip).arg("-o").arg(to.path()).arg(program));
        stripped.with_context(|| format!("{strip} can't strip {}", program.display()))?;
        fs::read(to.path()).context("reading a stripped program")
    }
}

/// What is between `start` and the next bracket.
fn between<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.split_once(start)?.1.split(']').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_brings_its_loader_and_libraries_and_theirs() {
        let own = std::env::current_exe().unwrap();
        let userland = Userland {
            architecture: Architecture::Amd64,
            root: PathBuf::from("/"),
            programs: Vec::new(),
            files: Vec::new(),
        };
        let mut found = BTreeSet::new();
        userland.libraries_of(&own, &mut found).unwrap();
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        for name in ["libc.so.6", "ld-linux-x86-64.so.2"] {
            assert!(names.contains(&name), "{found:?}");
        }
    }

    #[test]
    fn an_archive_has_each_folder_once_and_every_part_on_four_bytes() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.file(Path::new("/lib/a/one.so"), b"12345").unwrap();
        archive.file(Path::new("/lib/a/two.so"), b"1234").unwrap();
        archive.end().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let starts: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(starts.len(), 5, "{text:?}");
        assert!(starts.iter().chain([&bytes.len()]).all(|at| at % 4 == 0), "{starts:?}");
        for (start, name) in starts.iter().zip(["lib", "lib/a", "lib/a/one.so", "lib/a/two.so"]) {
            assert!(text[start + 110..].starts_with(&format!("{name}\0")), "{text:?}");
        }
        assert!(text.contains(&["12345", "\0\0\0", "070701"].concat()), "{text:?}");
    }
}
