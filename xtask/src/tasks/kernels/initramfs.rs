//! What a guest has: this command as process 1, the test, `ip`, the libraries of these, and the kernel's modules.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::debian::Kernel;
use xtask::command::{command, output_of, run};

/// The test in the guest.
pub(super) const PROBE: &str = "/bin/probe";
/// Modules are in it, named in the order to load them.
pub(super) const MODULES: &str = "/modules";

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

/// The archive for one kernel.
pub(super) fn build(kernel: &Kernel, probe: &Path) -> Result<NamedTempFile> {
    let image = NamedTempFile::new().context("making a file for the initramfs")?;
    let mut archive = Archive::new(BufWriter::new(image.reopen().context("opening it")?));
    let own = std::env::current_exe().context("asking for this program's path")?;
    let ip = ["/usr/sbin/ip", "/usr/bin/ip", "/sbin/ip", "/bin/ip"].map(Path::new);
    let ip = ip.into_iter().find(|path| path.exists()).context("ip is needed (iproute2)")?;
    let mut libraries = BTreeSet::new();
    for (from, to) in [(own.as_path(), "/init"), (probe, PROBE), (ip, "/bin/ip")] {
        libraries.extend(libraries_of(from)?);
        archive.file(Path::new(to), &stripped(from)?).context("writing the initramfs")?;
    }
    let modules = kernel.modules.iter().zip(1..);
    let modules = modules.map(|(path, number)| (path, format!("{MODULES}/{number}.ko").into()));
    let libraries = libraries.iter().map(|path| (path, path.clone()));
    for (from, to) in modules.chain(libraries) {
        let content = std::fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        archive.file(&to, &content).context("writing the initramfs")?;
    }
    archive.end().context("writing the initramfs")?;
    Ok(image)
}

/// The shared libraries of a program, and its loader, by the paths at which it looks for them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output_of(command("ldd").arg(program));
    let listed = listed.with_context(|| format!("ldd can't read {}", program.display()))?;
    let path = |line: &str| {
        let word = line.split_whitespace().find(|word| word.starts_with('/'))?;
        Some(PathBuf::from(word))
    };
    Ok(listed.lines().filter_map(path).collect())
}

/// The program without what only a debugger reads.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let to = NamedTempFile::new().context("making a file for a stripped program")?;
    run(command("strip").arg("-o").arg(to.path()).arg(program))?;
    let mut content = Vec::new();
    let mut file = File::open(to.path()).context("opening a stripped program")?;
    io::Read::read_to_end(&mut file, &mut content).context("reading a stripped program")?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

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
