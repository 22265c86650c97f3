//! The note that the boot guard's script leaves: since when its rules are in place.
//!
//! It is believed once, by the first agent after the boot, and only while all of the rules are still there: whatever happens
//! to them later, the kernel programs are attached by then.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, openat, unlinkat},
    io::Errno,
    process::geteuid,
};
use tracing::{info, warn};

use super::{
    super::{is_family_off, route},
    text::NOTE,
};
use crate::sys::since_boot;

/// The kernel's name for this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// More than the note has.
const LARGEST: u64 = 256;
/// `--guard-preference` at most.
const LAST_PREFERENCE: u32 = 32_761;

/// Why a note is not believed.
#[derive(Debug, thiserror::Error)]
enum NoteError {
    #[error("{0:?} is no note of the boot guard's script")]
    Text(String),
    #[error("others than root may write it")]
    Owner,
    #[error("it is of another boot")]
    OtherBoot,
    #[error("{0} of its routing rules are gone")]
    Rules(usize),
    #[error(transparent)]
    System(#[from] io::Error),
}

/// What the script noted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    boot: String,
    since: Duration,
    preference: u32,
}

/// Since when the boot guard's rules are in place, as a time since the node booted, by the note in `folder`, which is removed.
/// `None` where there is none that can be believed.
pub(crate) fn take_note(folder: &Path) -> Option<Duration> {
    let text = match take(folder) {
        Ok(text) => text?,
        Err(error) => {
            warn!(%error, folder = %folder.display(), "Ignoring the boot guard's note; pods that the boot guard blocked are reported too");
            return None;
        }
    };
    let since = Note::read(&text).and_then(|note| note.since(missing));
    match since {
        Ok(since) => {
            info!(since = ?since, "The boot guard's rules were in place before the kernel programs");
            Some(since)
        }
        Err(error) => {
            warn!(%error, "Ignoring the boot guard's note; pods that the boot guard blocked are reported too");
            None
        }
    }
}

/// Reads and removes the note. No link is followed, and the folder and the file must be root's alone to write.
fn take(folder: &Path) -> Result<Option<String>, NoteError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match openat(CWD, folder, flags | OFlags::DIRECTORY, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    let file = match openat(&directory, NOTE, flags | OFlags::NONBLOCK, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    unlinkat(&directory, NOTE, AtFlags::empty()).map_err(io::Error::from)?;
    let (folder, status) =
        (fstat(&directory).map_err(io::Error::from)?, fstat(&file).map_err(io::Error::from)?);
    let is_roots = |status: &rustix::fs::Stat| {
        status.st_uid == geteuid().as_raw() && status.st_mode & 0o022 == 0
    };
    let is_file = FileType::from_raw_mode(status.st_mode) == FileType::RegularFile;
    if !(is_file && is_roots(&folder) && is_roots(&status)) {
        return Err(NoteError::Owner);
    }
    let mut text = String::new();
    File::from(file).take(LARGEST).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// How many of the rules of `preference` are not there.
fn missing(preference: u32) -> io::Result<usize> {
    let mut missing = 0;
    for to in route::imds_addresses() {
        match route::missing(to, preference) {
            Ok(count) => missing += count,
            Err(error) if to.is_ipv6() && is_family_off(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(missing)
}

// === impl Note ===

impl Note {
    fn read(text: &str) -> Result<Self, NoteError> {
        let wrong = || NoteError::Text(text.to_owned());
        let mut words = text.split_ascii_whitespace();
        let (boot, since) = (words.next().ok_or_else(wrong)?, words.next().ok_or_else(wrong)?);
        let preference = words.next().and_then(|word| word.parse().ok());
        let since: f64 = since.parse().map_err(|_| wrong())?;
        Ok(Self {
            boot: boot.to_owned(),
            since: Duration::try_from_secs_f64(since).map_err(|_| wrong())?,
            preference: preference.filter(|it| *it <= LAST_PREFERENCE).ok_or_else(wrong)?,
        })
    }

    /// Since when the rules are in place, of which so many are `missing` now.
    fn since(&self, missing: impl Fn(u32) -> io::Result<usize>) -> Result<Duration, NoteError> {
        let boot = std::fs::read_to_string(BOOT_ID)?;
        if self.boot != boot.trim_end() || self.since > since_boot() {
            return Err(NoteError::OtherBoot);
        }
        match missing(self.preference)? {
            0 => Ok(self.since),
            count => Err(NoteError::Rules(count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    fn this_boot() -> String {
        fs::read_to_string(BOOT_ID).unwrap().trim_end().to_owned()
    }

    fn judged(text: &str, missing: usize) -> Result<Duration, String> {
        let since = Note::read(text).and_then(|note| note.since(|_| Ok(missing)));
        since.map_err(|error| error.to_string())
    }

    #[test]
    fn a_note_counts_in_its_own_boot_while_all_rules_are_there() {
        let boot = this_boot();
        let text = format!("{boot} 0.25 5\n");
        assert_eq!(judged(&text, 0), Ok(Duration::from_millis(250)));
        assert!(judged(&text, 1).unwrap_err().contains("1 of its routing rules"));
        let others = "00000000-0000-4000-8000-000000000000 0.25 5";
        let future = format!("{boot} {} 5", since_boot().as_secs() + 60);
        for text in [others, &future] {
            assert!(judged(text, 0).unwrap_err().contains("another boot"), "{text}");
        }
        for wrong in ["", &boot, &format!("{boot} x 5"), &format!("{boot} -1 5")] {
            assert!(judged(wrong, 0).unwrap_err().contains("no note"), "{wrong}");
        }
        for preference in ["", "x", "40000", "4294967295"] {
            let text = format!("{boot} 0.25 {preference}");
            assert!(judged(&text, 0).unwrap_err().contains("no note"), "{text}");
        }
    }

    #[test]
    fn a_note_is_read_once_and_only_where_root_alone_can_write_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, note) = (folder.path(), folder.path().join(NOTE));
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        fs::write(&note, "text").unwrap();
        assert_eq!(take(path).unwrap().as_deref(), Some("text"));
        assert_eq!(take(path).unwrap(), None, "taken");
        assert_eq!(take(&path.join("nowhere")).unwrap(), None);
        fs::write(&note, "text").unwrap();
        mode(&note, 0o666);
        assert!(matches!(take(path), Err(NoteError::Owner)), "a file that others may write");
        fs::write(&note, "text").unwrap();
        mode(path, 0o777);
        assert!(matches!(take(path), Err(NoteError::Owner)), "a folder where others may write");
        mode(path, 0o700);
        let elsewhere = path.join("elsewhere");
        fs::write(&elsewhere, "text").unwrap();
        symlink(&elsewhere, &note).unwrap();
        assert!(matches!(take(path), Err(NoteError::System(_))), "a link");
    }
}
