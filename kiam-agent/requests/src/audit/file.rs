//! The file of the audit, and the older ones that it is rotated to. Together they never take more than their size.
//!
//! The folder belongs to the agent's user, and nobody else may write there, so that nobody can put another file in the place of
//! the audit's. The file is opened again only when its name leads elsewhere. Two agents may write during a takeover: each
//! write and each rotation holds the file's lock. Whoever can open the file can hold that lock for ever, and root of a pod can
//! where the folder is mounted there, also read-only. So the wait has an end, and after it a line is appended without the lock;
//! only a rotation needs it.

use std::{
    ffi::{OsStr, OsString},
    fs::{DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{
        AtFlags, FlockOperation, Mode, OFlags, flock, fstat, ftruncate, open, openat, renameat,
        statat, unlinkat,
    },
    io::Errno,
    process::geteuid,
};

/// The files that are kept, the current one included.
const FILES: u64 = 4;
/// Attempts to lock the current file while another agent rotates it.
const TRIES: usize = 3;
/// The wait for the file's lock: attempts, and the pause between two. Another agent holds it for one write.
const LOCK_TRIES: usize = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// What to do about a lock that another process keeps.
const LOCKED: &str = "the file is full, and can't be rotated, as another process holds its lock (flock): end it, which \
                      `lslocks` on the node names, unless it is another kiam-agent; or set another --audit-file";

/// A file that is rotated by size.
pub(super) struct RotatedFile {
    path: PathBuf,
    /// The size of one of the files.
    part: u64,
    open: Option<OpenFile>,
    /// Whether another process kept the lock for the whole wait. Then further lines don't wait.
    is_locked: bool,
}

struct OpenFile {
    folder: File,
    file: File,
}

// === impl RotatedFile ===

impl RotatedFile {
    /// The file at `path`, which with the older ones has at most `size` bytes.
    pub(super) fn new(path: PathBuf, size: u64) -> Self {
        Self { path, part: size / FILES, open: None, is_locked: false }
    }

    /// Brings files that an agent with a larger size has left within this one's.
    ///
    /// # Errors
    ///
    /// The system's. The first line opens the file again.
    pub(super) fn shrink(&mut self) -> io::Result<()> {
        self.write(&[])
    }

    /// Appends `line`: all of it, or nothing.
    ///
    /// # Errors
    ///
    /// The system's, with the file's path. The next line opens the file again.
    pub(super) fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let written = self.append(line);
        written.map_err(|error| {
            self.open = None;
            io::Error::new(error.kind(), format!("{}: {error}", self.path.display()))
        })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let name = self.path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        for _ in 0..TRIES {
            let (open, is_new) = match self.open.take() {
                Some(open) => (open, false),
                None => (OpenFile::open(&self.path, &name)?, true),
            };
            let is_locked = self.lock(&open)?;
            if !open.is_at(&name)? {
                // Rotated by another agent, or removed. Closing it unlocks it.
                continue;
            }
            let length = open.file.metadata()?.len();
            if length > 0 && length + line.len() as u64 > self.part {
                if !is_locked {
                    return Err(io::Error::new(io::ErrorKind::WouldBlock, LOCKED));
                }
                open.rotate(&name)?;
                continue;
            }
            if is_new && is_locked {
                open.remove_excess(&name, self.part * (FILES - 1))?;
            }
            let written = open.append(line, is_locked.then_some(length));
            if is_locked {
                flock(&open.file, FlockOperation::Unlock)?;
            }
            self.open = Some(open);
            return written;
        }
        Err(io::Error::other("other programs replace the file"))
    }

    /// Takes the file's lock, which closing it releases; `false` if another process keeps it.
    fn lock(&mut self, open: &OpenFile) -> io::Result<bool> {
        let tries = if self.is_locked { 1 } else { LOCK_TRIES };
        for attempt in 1..=tries {
            match flock(&open.file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    self.is_locked = false;
                    return Ok(true);
                }
                Err(Errno::WOULDBLOCK) if attempt < tries => thread::sleep(LOCK_PAUSE),
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.is_locked = true;
        Ok(false)
    }
}

// === impl OpenFile ===

impl OpenFile {
    /// Opens the file `name` at `path`, and creates it and its folder if need be, for the agent's user alone.
    fn open(path: &Path, name: &OsStr) -> io::Result<Self> {
        let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = File::from(open(folder, flags, Mode::empty())?);
        let metadata = folder.metadata()?;
        if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::other("other users may write to the file's folder"));
        }
        // Without O_NONBLOCK a FIFO would wait for a reader.
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::CLOEXEC;
        let file = File::from(openat(&folder, name, flags, Mode::RUSR | Mode::WUSR)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(Self { folder, file })
    }

    /// Whether `name` still leads to this file.
    fn is_at(&self, name: &OsStr) -> io::Result<bool> {
        let own = fstat(&self.file)?;
        match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) => Ok((there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Renames the files, so that the oldest is lost and `name` is free.
    fn rotate(&self, name: &OsStr) -> io::Result<()> {
        for number in (1..FILES).rev() {
            let (from, to) = (numbered(name, number - 1), numbered(name, number));
            match renameat(&self.folder, from, &self.folder, to) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Removes the oldest of the older files, until the rest of them has at most `room` bytes. They have more where an agent
    /// with a larger size wrote them.
    fn remove_excess(&self, name: &OsStr, room: u64) -> io::Result<()> {
        let mut sum = 0;
        for older in (1..FILES).map(|number| numbered(name, number)) {
            match statat(&self.folder, &older, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) => sum += u64::try_from(found.st_size).unwrap_or_default(),
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            }
            if sum > room {
                unlinkat(&self.folder, &older, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Appends `line` to the file, or leaves it as it was where its `length` is given, as nobody else writes then.
    fn append(&self, line: &[u8], length: Option<u64>) -> io::Result<()> {
        (&self.file).write_all(line).inspect_err(|_| {
            // A part of a line would spoil the next one.
            length.map(|length| ftruncate(&self.file, length));
        })
    }
}

/// The name of the file, for `number` 0, or of an older one.
fn numbered(name: &OsStr, number: u64) -> OsString {
    let mut numbered = OsString::from(name);
    if number > 0 {
        numbered.push(format!(".{number}"));
    }
    numbered
}
