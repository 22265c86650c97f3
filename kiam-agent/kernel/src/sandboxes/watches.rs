//! Watches of files, as many as the system allows.
//!
//! The limits of inotify are for everything that root runs on the node, so that others can use them up. Then watches are
//! missing, which is counted and logged, and [`Watches::begin`] tries again.

use std::{
    collections::HashMap,
    ffi::OsStr,
    future, io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use kiam_core::{pods::PodUid, telemetry::LogLimit};

/// What is read at once.
const BUFFER: usize = 16 * 1024;
/// How often it is logged that watches are refused.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// What a watch is for.
#[derive(Clone, Debug)]
pub(super) enum WatchTarget {
    Folder(PathBuf),
    Pod(PodUid),
    /// The pod's `cgroup.events`, or its container's of this name.
    Events(PodUid, Option<Box<OsStr>>),
    Processes(PodUid),
}

/// An event: the watch, what happened, and the name of the file in a folder.
pub(super) type WatchEvent = (i32, ReadFlags, Option<Vec<u8>>);

/// The watches that there are.
#[derive(Debug)]
pub(super) struct Watches {
    /// `None` while the system has none to give.
    inotify: Option<AsyncFd<OwnedFd>>,
    places: HashMap<i32, WatchTarget>,
    /// What the system has refused since [`Watches::begin`].
    refused: u64,
    log: LogLimit<()>,
    /// A refusal was logged, and its end was not.
    logged: bool,
}

// === impl Watches ===

impl Default for Watches {
    fn default() -> Self {
        let log = LogLimit::new(LOG_PERIOD);
        Self { inotify: None, places: HashMap::new(), refused: 0, log, logged: false }
    }
}

impl Watches {
    /// Begins to add what is missing, and asks for an inotify instance where there is none.
    pub(super) fn begin(&mut self) {
        self.refused = 0;
        if self.inotify.is_some() {
            return;
        }
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        #[expect(
            deprecated,
            reason = "unsound only for what may change its descriptor, and an `OwnedFd` can't; the new way is unsafe"
        )]
        match inotify.map_err(io::Error::from).and_then(AsyncFd::new) {
            Ok(inotify) => self.inotify = Some(inotify),
            Err(error) => self.refuse(&error),
        }
    }

    /// All that was to be added was tried.
    pub(super) fn complete(&mut self) {
        if self.refused == 0 && std::mem::take(&mut self.logged) {
            info!("All pods' cgroups are watched again");
        }
    }

    /// How many are missing, because the system refuses them.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Counts and logs that the system refuses to show a change.
    pub(super) fn refuse(&mut self, error: &io::Error) {
        self.refused += 1;
        if self.log.admit(()).is_some() {
            self.logged = true;
            warn!(
                %error,
                "Some pods' cgroups can't be watched: a sweep every 2 s finds new pods, which are denied until then; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
            );
        }
    }

    /// The next events; none while there is no inotify.
    pub(super) async fn next(&self) -> io::Result<Vec<WatchEvent>> {
        match &self.inotify {
            Some(inotify) => read(inotify).await,
            None => future::pending().await,
        }
    }

    pub(super) fn place(&self, watch: i32) -> Option<WatchTarget> {
        self.places.get(&watch).cloned()
    }

    /// The number of the watch, which is the same for what is watched already; `None` when `path` is gone, and when the
    /// system refuses.
    pub(super) fn add(
        &mut self,
        path: &Path,
        flags: WatchFlags,
        place: WatchTarget,
    ) -> Option<i32> {
        let Some(inotify) = &self.inotify else {
            self.refused += 1;
            return None;
        };
        match inotify::add_watch(inotify.get_ref(), path, flags) {
            Ok(watch) => {
                self.places.insert(watch, place);
                Some(watch)
            }
            Err(Errno::NOENT | Errno::NODEV) => None,
            Err(error) => {
                self.refuse(&error.into());
                None
            }
        }
    }

    pub(super) fn end(&mut self, watch: i32) {
        self.ended(watch);
        if let Some(inotify) = &self.inotify {
            // An error means that the kernel has ended it.
            let _ = inotify::remove_watch(inotify.get_ref(), watch);
        }
    }

    /// The kernel has ended it.
    pub(super) fn ended(&mut self, watch: i32) {
        self.places.remove(&watch);
    }

    /// Gives up all of them: `error` is that of [`Watches::next`].
    pub(super) fn lose(&mut self, error: &io::Error) {
        (self.inotify, self.places) = (None, HashMap::new());
        self.refuse(error);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }
}

async fn read(inotify: &AsyncFd<OwnedFd>) -> io::Result<Vec<WatchEvent>> {
    loop {
        let mut ready = inotify.readable().await?;
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        // One read: the reader goes on reading when its buffer is empty.
        let mut reader = Reader::new(ready.get_inner(), &mut buffer);
        let mut seen = Vec::new();
        let outcome = loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_bytes().to_vec());
                    seen.push((event.wd(), event.events(), name));
                }
                Err(error) => break error,
            }
            if reader.is_buffer_empty() {
                break Errno::AGAIN;
            }
        };
        match outcome {
            Errno::AGAIN if seen.is_empty() => ready.clear_ready(),
            Errno::AGAIN | Errno::INTR => return Ok(seen),
            error => return Err(error.into()),
        }
    }
}
