//! The file with the key of tokens, which survives restarts of the agent.

use std::{
    ffi::OsStr,
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::OFlags,
    process::geteuid,
    rand::{GetRandomFlags, getrandom},
};
use zeroize::Zeroizing;

const NAME: &str = "token.key";
/// The prefix of a key file that is being written.
const DRAFT: &str = ".token.key.";
const KEY_BYTES: usize = 32;

type Key = Zeroizing<[u8; KEY_BYTES]>;

/// Why there is no key. Retrying does not help.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The folder can't be created or restricted to root.
    #[error("can't prepare the state directory {path} (--state-dir): {source}")]
    Directory {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file can't be read or written.
    #[error("can't read or write the token key {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file is not a key.
    #[error("{path} is not a token key: {problem}; remove it to get a new one")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The system gives no random bytes.
    #[error("can't get random bytes for the token key: {0}")]
    Random(#[source] io::Error),
    /// The boot's id can't be read.
    #[error("can't read /proc/sys/kernel/random/boot_id: {0}")]
    BootId(#[source] io::Error),
}

/// Whether `name` in the state folder is the key's file, or one that is being written.
#[must_use]
pub fn is_key_file(name: &str) -> bool {
    name == NAME || name.starts_with(DRAFT)
}

/// Opens the key in `directory`. Creates both if they are missing.
pub(super) fn open(directory: &Path) -> Result<Key, KeyError> {
    prepare(directory)
        .map_err(|source| KeyError::Directory { path: directory.to_owned(), source })?;
    let path = directory.join(NAME);
    if let Some(key) = read(&path)? {
        return Ok(key);
    }
    let mut key = Key::default();
    getrandom(&mut *key, GetRandomFlags::empty())
        .map_err(|error| KeyError::Random(error.into()))?;
    match create(directory, &path, &*key) {
        Ok(()) => Ok(key),
        // Another agent was faster: its key counts.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            read(&path)?.ok_or(KeyError::Bad { path, problem: "it was removed while it was read" })
        }
        Err(source) => Err(KeyError::File { path, source }),
    }
}

fn prepare(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    // The kubelet creates hostPath folders with 0755. But a shared folder such as /run or /tmp must not be restricted.
    let is_open = std::fs::metadata(directory)?.mode() & 0o077 != 0;
    // Another agent may be creating the key.
    let is_draft = |name: &OsStr| name.as_encoded_bytes().starts_with(DRAFT.as_bytes());
    let others = || -> io::Result<bool> {
        Ok(directory.read_dir()?.flatten().any(|entry| {
            let name = entry.file_name();
            name != *NAME && !is_draft(&name)
        }))
    };
    if is_open && !directory.join(NAME).exists() && others()? {
        return Err(io::Error::other(
            "it is open to other users and not empty: name a folder for the agent alone",
        ));
    }
    std::fs::set_permissions(directory, Permissions::from_mode(0o700))
}

fn read(path: &Path) -> Result<Option<Key>, KeyError> {
    let failed = |source| KeyError::File { path: path.to_owned(), source };
    let bad = |problem| KeyError::Bad { path: path.to_owned(), problem };
    // Do not follow a link, nor wait for the other end of a pipe.
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits())
        .expect("open(2) takes its flags as an int");
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(bad("it is not a file"));
    }
    if metadata.uid() != geteuid().as_raw() {
        return Err(bad("it belongs to another user"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(bad("other users can access it (mode must be 0600)"));
    }
    if metadata.len() != KEY_BYTES as u64 {
        return Err(bad("it is not 32 bytes long"));
    }
    let mut key = Key::default();
    (&file).read_exact(&mut *key).map_err(failed)?;
    Ok(Some(key))
}

/// Writes `key` beside `path` and links it there: atomically, and without replacing an existing file.
fn create(directory: &Path, path: &Path, key: &[u8]) -> io::Result<()> {
    let draft = directory.join(format!("{DRAFT}{:016x}", fastrand::u64(..)));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    let written = file
        .write_all(key)
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::hard_link(&draft, path));
    std::fs::remove_file(&draft)?;
    written.and_then(|()| File::open(directory)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn key_is_made_once_and_for_its_owner_alone() {
        let parent = tempfile::tempdir().unwrap();
        let state = parent.path().join("run/kiam");
        let key = open(&state).unwrap();
        assert_eq!(open(&state).unwrap(), key);
        assert_ne!(*key, [0; KEY_BYTES]);
        assert_eq!((mode(&state), mode(&state.join(NAME))), (0o700, 0o600));
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn open_folder_is_closed() {
        let state = tempfile::tempdir().unwrap();
        std::fs::set_permissions(state.path(), Permissions::from_mode(0o755)).unwrap();
        open(state.path()).unwrap();
        assert_eq!(mode(state.path()), 0o700);
    }

    #[test]
    fn folder_that_others_use_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("somebody's"), "").unwrap();
        std::fs::set_permissions(state.path(), Permissions::from_mode(0o755)).unwrap();
        let error = open(state.path()).unwrap_err().to_string();
        assert!(error.contains("open to other users"), "{error}");
        assert_eq!(mode(state.path()), 0o755);
    }

    #[test]
    fn error_says_what_the_system_says() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = open(&file.join("state")).unwrap_err().to_string();
        assert!(error.contains("Not a directory"), "{error}");
    }

    #[test]
    fn agents_that_start_together_agree_on_a_key() {
        let state = tempfile::tempdir().unwrap();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| open(state.path()).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
        assert_eq!(open(state.path()).unwrap(), keys[0]);
    }

    #[test]
    fn bad_files_are_refused_by_name() {
        type Spoil = fn(&Path);
        let cases: [(&str, Spoil); 5] = [
            ("32 bytes", |path| std::fs::write(path, [7; 31]).unwrap()),
            ("32 bytes", |path| std::fs::write(path, "").unwrap()),
            ("mode", |path| {
                std::fs::write(path, [7; KEY_BYTES]).unwrap();
                std::fs::set_permissions(path, Permissions::from_mode(0o640)).unwrap();
            }),
            ("not a file", |path| std::fs::create_dir(path).unwrap()),
            ("token key", |path| std::os::unix::fs::symlink("/etc/hostname", path).unwrap()),
        ];
        for (expected, spoil) in cases {
            let state = tempfile::tempdir().unwrap();
            let path = state.path().join(NAME);
            spoil(&path);
            if path.is_file() && expected != "mode" && !path.is_symlink() {
                std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            }
            let error = open(state.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
