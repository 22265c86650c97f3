//! The boot guard's files, in the node's folder of units.
//!
//! Every name is opened, created, renamed and removed relative to the open folder, and no link is followed, so that
//! nothing outside the folder is read or written. Writes are atomic, also across a power loss.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, fchmod, fstat, fstatfs, fsync, mkdirat, openat,
        readlinkat, renameat, statat, symlinkat, unlinkat,
    },
    io::Errno,
    process::geteuid,
    time::{ClockId, clock_gettime},
};

use super::text::{FOLDER, SCRIPT, UNIT, UNIT_TEXT, WANTS, script};

/// The files' mode: readable by everybody, writable by root.
const MODE: u32 = 0o644;
/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`: file systems that do not outlive a boot.
const VOLATILE: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// The most bytes that are read of a file: more than the texts have.
const LARGEST: u64 = 64 * 1024;
/// Seconds after which a draft is of a start that was cut short, and of no agent that writes now.
const ABANDONED: u64 = 60;

/// Why the boot guard's files can't be installed or removed.
#[derive(Debug, thiserror::Error)]
pub enum BootGuardError {
    /// The folder can't be used.
    #[error("--boot-guard {path:?}: {problem}; mount the node's /etc/systemd/system there")]
    Folder {
        /// The folder, as configured.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file can't be read, written or removed.
    #[error("{what} {path:?} for the boot guard: {source}")]
    File {
        /// The action that failed.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The task panicked.
    #[error("the boot guard's work panicked")]
    Panicked,
}

/// The node's open folder of units.
struct Folder {
    path: PathBuf,
    directory: OwnedFd,
}

/// Installs the unit, its script and the link that enables it in `folder`, for rules of `preference`. Returns the files
/// that it wrote.
///
/// # Errors
///
/// [`BootGuardError`]; files that were written before the failure stay.
pub(super) fn install(folder: &Path, preference: u32) -> Result<Vec<String>, BootGuardError> {
    let folder = Folder::open(folder)?;
    folder.check_lasting()?;
    folder.install(preference)
}

/// Whether [`install`] would take `folder`, as far as can be seen without writing.
///
/// # Errors
///
/// [`BootGuardError::Folder`].
pub(super) fn check(folder: &Path) -> Result<(), BootGuardError> {
    Folder::open(folder)?.check_lasting()
}

/// Removes what [`install`] wrote to `folder`, and returns the removed files. Missing files are no error.
///
/// # Errors
///
/// [`BootGuardError`] for the first that can't be removed.
pub(super) fn remove(folder: &Path) -> Result<Vec<String>, BootGuardError> {
    match Folder::open(folder) {
        Ok(folder) => folder.remove(),
        Err(_) if !folder.exists() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

// === impl Folder ===

impl Folder {
    fn open(path: &Path) -> Result<Self, BootGuardError> {
        let unfit = |problem| BootGuardError::Folder { path: path.to_owned(), problem };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, path, flags, Mode::empty())
            .map_err(|error| unfit(io::Error::from(error).to_string()))?;
        let folder = Self { path: path.to_owned(), directory };
        let status = fstat(&folder.directory).map_err(folder.failed("look at", ""))?;
        // Whoever can write there owns the node already, unless the wrong folder is mounted.
        if status.st_uid != geteuid().as_raw() || status.st_mode & 0o022 != 0 {
            return Err(unfit("users other than root can write to it".to_owned()));
        }
        Ok(folder)
    }

    fn check_lasting(&self) -> Result<(), BootGuardError> {
        let system = fstatfs(&self.directory).map_err(self.failed("look at", ""))?;
        if u64::try_from(system.f_type).is_ok_and(|kind| VOLATILE.contains(&kind)) {
            let problem = "it is in memory, so that files there do not survive a reboot";
            return Err(BootGuardError::Folder {
                path: self.path.clone(),
                problem: problem.to_owned(),
            });
        }
        Ok(())
    }

    fn install(&self, preference: u32) -> Result<Vec<String>, BootGuardError> {
        let mut written = Vec::new();
        self.remove_drafts(&self.directory, [SCRIPT, UNIT]).map_err(self.failed("clean", ""))?;
        // The link last, so that systemd never sees an incomplete unit.
        for (name, text) in [(SCRIPT, script(preference).as_str()), (UNIT, UNIT_TEXT)] {
            if !self.holds(name, text).map_err(self.failed("read", name))? {
                self.write(name, text).map_err(self.failed("write", name))?;
                written.push(name.to_owned());
            }
        }
        let wants = self.wants().map_err(self.failed("open", WANTS))?;
        self.remove_drafts(&wants, [UNIT]).map_err(self.failed("clean", WANTS))?;
        if self.link(&wants).map_err(self.failed("link the unit in", WANTS))? {
            written.push(format!("{WANTS}/{UNIT}"));
        }
        Ok(written)
    }

    /// Whether `name` is a file with this text that root alone may change.
    fn holds(&self, name: &str, text: &str) -> Result<bool, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => file,
            // A link or a socket is replaced.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(false),
            Err(error) => return Err(error),
        };
        let status = fstat(&file)?;
        let is_ours = FileType::from_raw_mode(status.st_mode) == FileType::RegularFile
            && status.st_mode & 0o7777 == MODE
            && status.st_uid == geteuid().as_raw();
        let mut content = Vec::new();
        let read = File::from(file).take(LARGEST).read_to_end(&mut content);
        // A directory can't be read. Writing reports that.
        Ok(is_ours && read.is_ok() && content == text.as_bytes())
    }

    /// Writes the file under a name that no other agent uses, and renames it.
    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let draft = draft(name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, &draft, flags, Mode::from_raw_mode(0o600))?;
        let mut file = File::from(file);
        let written = file
            .write_all(text.as_bytes())
            .and_then(|()| Ok(fchmod(&file, Mode::from_raw_mode(MODE))?))
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(renameat(&self.directory, &draft, &self.directory, name)?));
        if written.is_err() {
            let _ = unlinkat(&self.directory, &draft, AtFlags::empty());
        }
        written.and_then(|()| Ok(fsync(&self.directory)?))
    }

    /// Opens the folder of units that are started at boot, and creates it if it is missing.
    fn wants(&self) -> Result<OwnedFd, Errno> {
        match mkdirat(&self.directory, WANTS, Mode::from_raw_mode(0o755)) {
            Ok(()) => fsync(&self.directory)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        self.open_wants()
    }

    fn open_wants(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.directory, WANTS, flags, Mode::empty())
    }

    /// Creates the link that `systemctl enable` creates, and returns whether it was missing.
    fn link(&self, wants: &OwnedFd) -> Result<bool, Errno> {
        let target = format!("{FOLDER}/{UNIT}");
        match readlinkat(wants, UNIT, Vec::new()) {
            Ok(there) if there.as_bytes() == target.as_bytes() => return Ok(false),
            // Anything else is replaced.
            Ok(_) | Err(Errno::NOENT | Errno::INVAL) => {}
            Err(error) => return Err(error),
        }
        let draft = draft(UNIT);
        symlinkat(&target, wants, &draft)?;
        let renamed = renameat(wants, &draft, wants, UNIT);
        if renamed.is_err() {
            let _ = unlinkat(wants, &draft, AtFlags::empty());
        }
        renamed.and_then(|()| fsync(wants))?;
        Ok(true)
    }

    /// Removes what starts that were cut short left of `names` in `directory`.
    fn remove_drafts<const N: usize>(
        &self,
        directory: &OwnedFd,
        names: [&str; N],
    ) -> Result<(), Errno> {
        let now = u64::try_from(clock_gettime(ClockId::Realtime).tv_sec).unwrap_or_default();
        for draft in drafts(directory, &names)? {
            let status = match statat(directory, &draft, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(status) => status,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error),
            };
            // One from the future is from before the clock was set back.
            let written = u64::try_from(status.st_mtime).unwrap_or_default();
            if written.abs_diff(now) > ABANDONED {
                // What can't be removed harms nobody.
                let _ = unlinkat(directory, &draft, AtFlags::empty());
            }
        }
        Ok(())
    }

    fn remove(&self) -> Result<Vec<String>, BootGuardError> {
        let mut removed = Vec::new();
        let mut unlink = |directory: &OwnedFd, shown: String, name: &str| {
            match unlinkat(directory, name, AtFlags::empty()) {
                Ok(()) => removed.push(self.path.join(shown).display().to_string()),
                Err(Errno::NOENT) => {}
                // A read-only file system returns this error for missing files, too.
                Err(Errno::ROFS) if is_absent(directory, name) => {}
                Err(error) => return Err(self.failed("remove", name)(error)),
            }
            Ok(())
        };
        // The link first, so that nothing starts an incomplete unit.
        match self.open_wants() {
            Ok(wants) => {
                let drafts = drafts(&wants, &[UNIT]).map_err(self.failed("read", WANTS))?;
                for name in [UNIT.to_owned()].into_iter().chain(drafts) {
                    unlink(&wants, format!("{WANTS}/{name}"), &name)?;
                }
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(self.failed("open", WANTS)(error)),
        }
        let drafts = drafts(&self.directory, &[UNIT, SCRIPT]).map_err(self.failed("read", ""))?;
        for name in [UNIT.to_owned(), SCRIPT.to_owned()].into_iter().chain(drafts) {
            unlink(&self.directory, name.clone(), &name)?;
        }
        // The folder is removed only if it is empty.
        let _ = unlinkat(&self.directory, WANTS, AtFlags::REMOVEDIR);
        fsync(self.directory.as_fd()).map_err(self.failed("write", ""))?;
        Ok(removed)
    }

    fn failed<E: Into<io::Error>>(
        &self,
        what: &'static str,
        name: &str,
    ) -> impl FnOnce(E) -> BootGuardError + use<E> {
        let path = if name.is_empty() { self.path.clone() } else { self.path.join(name) };
        move |source| BootGuardError::File { what, path, source: source.into() }
    }
}

fn is_absent(directory: &OwnedFd, name: &str) -> bool {
    statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_err_and(|error| error == Errno::NOENT)
}

/// A new name for a file while it is written: agents of two pods may write at once. systemd ignores hidden files.
fn draft(name: &str) -> String {
    format!(".{name}.{:016x}.new", fastrand::u64(..))
}

/// The drafts of `names` in `directory`.
fn drafts(directory: &OwnedFd, names: &[&str]) -> Result<Vec<String>, Errno> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let Ok(file) = entry.file_name().to_str() else { continue };
        let is_of = |name: &&str| {
            let rest = file.strip_prefix('.').and_then(|file| file.strip_prefix(*name));
            rest.is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".new"))
        };
        if names.iter().any(is_of) {
            found.push(file.to_owned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
        thread,
        time::Duration,
    };

    use rustix::{
        mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount},
        thread::{UnshareFlags, unshare_unsafe},
    };

    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(directory.path()).unwrap();
        (directory, folder)
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn files_are_written_once_for_root_alone_to_change_and_removed_without_a_trace() {
        let (directory, folder) = folder();
        let path = directory.path();
        assert_eq!(folder.install(5).unwrap().len(), 3);
        assert_eq!(names(path), [UNIT, SCRIPT, WANTS]);
        for name in [UNIT, SCRIPT] {
            let status = fs::metadata(path.join(name)).unwrap();
            assert_eq!(status.mode() & 0o7777, 0o644, "{name}");
        }
        let link = fs::read_link(path.join(WANTS).join(UNIT)).unwrap();
        assert_eq!(link, Path::new(FOLDER).join(UNIT));
        assert_eq!(folder.install(5).unwrap(), Vec::<String>::new(), "nothing is left to do");
        assert_eq!(folder.install(40).unwrap(), [SCRIPT], "another preference");
        assert!(fs::read_to_string(path.join(SCRIPT)).unwrap().contains("pref 44 "));
        assert_eq!(remove(path).unwrap().len(), 3);
        assert_eq!(names(path), Vec::<String>::new());
        assert_eq!(remove(path).unwrap(), Vec::<String>::new());
        assert_eq!(remove(&path.join("nowhere")).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn what_others_changed_or_left_half_done_is_put_right() {
        let (directory, folder) = folder();
        let path = directory.path();
        folder.install(5).unwrap();
        fs::set_permissions(path.join(SCRIPT), fs::Permissions::from_mode(0o666)).unwrap();
        fs::write(path.join(UNIT), "[Unit]\n").unwrap();
        let (old, new) = (path.join(draft(UNIT)), path.join(draft(UNIT)));
        for (draft, age) in [(&old, ABANDONED + 5), (&new, 0)] {
            fs::write(draft, "half").unwrap();
            let written = File::open(draft).unwrap().metadata().unwrap().modified().unwrap();
            let file = File::options().write(true).open(draft).unwrap();
            file.set_modified(written - Duration::from_secs(age)).unwrap();
        }
        fs::remove_file(path.join(WANTS).join(UNIT)).unwrap();
        symlink("/elsewhere", path.join(WANTS).join(UNIT)).unwrap();
        assert_eq!(folder.install(5).unwrap().len(), 3);
        assert_eq!(fs::read_to_string(path.join(UNIT)).unwrap(), UNIT_TEXT);
        assert!(!old.exists() && new.exists(), "another agent may write the newer one just now");
        assert_eq!(folder.install(5).unwrap(), Vec::<String>::new());
        assert_eq!(folder.remove().unwrap().len(), 4);
        assert_eq!(names(path), Vec::<String>::new());
    }

    #[test]
    fn agents_that_write_at_once_leave_whole_files_and_fail_nobody() {
        let (directory, _) = folder();
        let path = directory.path();
        thread::scope(|scope| {
            let write = |preference| {
                move || {
                    for round in 0..100_u32 {
                        let written = Folder::open(path).unwrap().install(preference + round % 2);
                        written.unwrap_or_else(|error| panic!("{preference}: {error}"));
                    }
                }
            };
            let writers: Vec<_> =
                [10, 20, 30].map(|preference| scope.spawn(write(preference))).into();
            let texts: Vec<_> = [10, 11, 20, 21, 30, 31].map(script).into();
            while writers.iter().any(|writer| !writer.is_finished()) {
                if let Ok(text) = fs::read_to_string(path.join(SCRIPT)) {
                    assert!(texts.contains(&text), "half of a file, or two: {text}");
                }
            }
        });
        assert_eq!(names(path), [UNIT, SCRIPT, WANTS]);
    }

    #[test]
    fn links_that_lead_elsewhere_are_replaced_and_never_followed() {
        let (directory, folder) = folder();
        let elsewhere = tempfile::tempdir().unwrap();
        let (path, secret) = (directory.path(), elsewhere.path().join("secret"));
        fs::write(&secret, "as it was").unwrap();
        for name in [UNIT, SCRIPT] {
            symlink(&secret, path.join(name)).unwrap();
        }
        folder.install(5).unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "as it was");
        assert!(fs::symlink_metadata(path.join(UNIT)).unwrap().is_file());
        // A folder that is a link is not replaced, and nothing is made where it leads.
        folder.remove().unwrap();
        symlink(elsewhere.path(), path.join(WANTS)).unwrap();
        let error = folder.install(5).unwrap_err().to_string();
        assert!(error.contains(WANTS) && error.contains("for the boot guard"), "{error}");
        assert_eq!(names(elsewhere.path()), ["secret"]);
        folder.remove().unwrap_err();
    }

    #[test]
    fn a_folder_that_others_may_write_or_that_is_none_is_refused() {
        let (directory, _) = folder();
        let path = directory.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        let error = install(path, 5).unwrap_err().to_string();
        assert!(error.contains("users other than root can write to it"), "{error}");
        let error = install(&path.join("nowhere"), 5).unwrap_err().to_string();
        assert!(error.contains("No such file") && error.contains("/etc/systemd/system"), "{error}");
        assert_eq!(names(path), Vec::<String>::new());
    }

    #[test]
    fn a_folder_in_memory_is_refused() {
        let memory = Path::new("/dev/shm");
        let Ok(directory) = tempfile::tempdir_in(memory) else {
            return println!("skipped: no {}", memory.display());
        };
        let error = install(directory.path(), 5).unwrap_err().to_string();
        assert!(error.contains("do not survive a reboot"), "{error}");
    }

    #[test]
    fn a_folder_that_is_read_only_has_nothing_to_remove_or_says_so() {
        if lab::skip!() {
            return;
        }
        let (directory, folder) = folder();
        let path = directory.path();
        let remove_read_only = || {
            thread::scope(|scope| {
                let removed = scope.spawn(|| {
                    // SAFETY: NEWNS does not unshare the descriptor table, the one flag that is unsafe.
                    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
                    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                    mount_change("/", private).unwrap();
                    mount_bind(path, path).unwrap();
                    mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
                    remove(path)
                });
                removed.join().unwrap()
            })
        };
        assert_eq!(remove_read_only().unwrap(), Vec::<String>::new());
        folder.install(5).unwrap();
        let error = remove_read_only().unwrap_err();
        assert!(matches!(&error, BootGuardError::File { what: "remove", .. }), "{error}");
        assert_eq!(names(path).len(), 3, "as it was");
    }
}
