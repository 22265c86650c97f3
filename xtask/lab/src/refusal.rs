//! A system call that fails as it would on a node that has run out of something, until it no longer does.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};

/// A system call that is refused to a thread, and to the threads and processes that it starts from then on.
#[derive(Clone, Debug)]
pub struct Refusal {
    errno: Arc<AtomicI32>,
    count: Arc<AtomicU64>,
}

// === impl Refusal ===

impl Refusal {
    /// Refuses `call`, such as `libc::SYS_inotify_init1`, to the calling thread, with `errno`.
    pub fn of(call: libc::c_long, errno: i32) -> Result<Self> {
        Self::start(call, None, errno)
    }

    /// As [`Self::of`], for calls whose argument of this index has this value, such as a command of bpf(2).
    pub fn of_argument(call: libc::c_long, argument: (u32, u32), errno: i32) -> Result<Self> {
        Self::start(call, Some(argument), errno)
    }

    fn start(call: libc::c_long, argument: Option<(u32, u32)>, errno: i32) -> Result<Self> {
        let refusal = Self { errno: Arc::new(errno.into()), count: Arc::default() };
        // Started before there is a filter, as its own calls must not wait for itself.
        let (sender, receiver) = mpsc::channel::<OwnedFd>();
        let decides = refusal.clone();
        thread::spawn(move || {
            if let Ok(listener) = receiver.recv() {
                while decides.answer(&listener).is_ok() {}
            }
        });
        let listener = notify_of(call, argument).context("filtering system calls")?;
        sender.send(listener).context("the thread that answers has ended")?;
        Ok(refusal)
    }

    /// Lets the call through from now on.
    pub fn lift(&self) {
        self.errno.store(0, Ordering::SeqCst);
    }

    /// Refuses it again.
    pub fn renew(&self, errno: i32) {
        self.errno.store(errno, Ordering::SeqCst);
    }

    /// How often it was refused.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Decides about the next call; an error when nobody is left that could make one.
    fn answer(&self, listener: &OwnedFd) -> io::Result<()> {
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        poll(&mut ready, None)?;
        if !ready[0].revents().contains(PollFlags::IN) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        // SAFETY: all zeroes are a valid `seccomp_notif`, and what the kernel asks for.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and the pointer is to a live `seccomp_notif`.
        let got = unsafe {
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call)
        };
        if got < 0 {
            // Whoever made it was killed meanwhile.
            return Ok(());
        }
        let errno = self.errno.load(Ordering::SeqCst);
        let flags = if errno == 0 { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE } else { 0 };
        self.count.fetch_add(u64::from(errno != 0), Ordering::SeqCst);
        let mut verdict =
            libc::seccomp_notif_resp { id: call.id, val: 0, error: -errno, flags: flags as u32 };
        // SAFETY: the descriptor is open, and the pointer is to a live `seccomp_notif_resp`. It fails when the caller was killed.
        unsafe {
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut verdict)
        };
        Ok(())
    }
}

/// Where a filter sees the lower half of the first argument, and how far the next one is.
const ARGUMENTS: u32 = 16;
const ARGUMENT: u32 = 8;

/// Has the calling thread wait at `call`, with an argument of this index and value if one is given, until the returned
/// descriptor's reader decides (seccomp_unotify(2)).
fn notify_of(call: libc::c_long, argument: Option<(u32, u32)>) -> io::Result<OwnedFd> {
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let call = u32::try_from(call).map_err(io::Error::other)?;
    let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let unless =
        |value, skipped| statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skipped, value);
    // Without an argument, the call's number is compared again.
    let (place, value) = match argument {
        Some((index, value)) => (ARGUMENTS + index * ARGUMENT, value),
        None => (0, call),
    };
    let mut filter = [
        // The call's number is the first of what a filter sees.
        load(0),
        unless(call, 3),
        load(place),
        unless(value, 1),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its statements outlive the call, which copies them.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let listener = i32::try_from(listener).ok().filter(|listener| *listener >= 0);
    let listener = listener.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}
