//! Sealed memory for secrets on their way to the successor: it has no name, can't be changed, and ends with its last
//! descriptor.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::FileExt as _},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use zeroize::Zeroizing;

/// The largest content: four times the size of sessions for ten times the pods that a node runs.
const MOST: usize = 16 << 20;

const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// Creates sealed memory with a copy of `bytes`.
pub(super) fn seal(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(create()?);
    file.write_all(bytes)?;
    fcntl_add_seals(&file, SEALS)?;
    Ok(file.into())
}

/// Reads the content of `sealed`. Unsealed memory is an error, since another process could change it meanwhile.
pub(super) fn open(sealed: OwnedFd) -> io::Result<Zeroizing<Vec<u8>>> {
    let odd = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let seals = fcntl_get_seals(&sealed)?;
    if !seals.contains(SEALS) {
        return odd(format!("the memory is not sealed: {seals:?}"));
    }
    let size = fstat(&sealed)?.st_size;
    let Some(size) = usize::try_from(size).ok().filter(|size| *size <= MOST) else {
        return odd(format!("{size} bytes are more than any agent sends"));
    };
    let mut bytes = Zeroizing::new(vec![0; size]);
    // By position, since the descriptors share their offset.
    File::from(sealed).read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn create() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(c"kiam-sessions", flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3.
        Err(rustix::io::Errno::INVAL) => memfd_create(c"kiam-sessions", flags),
        created => created,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_read_and_never_changed() {
        let sealed = seal(b"secret").unwrap();
        let seals = fcntl_get_seals(&sealed).unwrap();
        assert!(seals.contains(SEALS), "{seals:?}");
        let file = File::from(sealed.try_clone().unwrap());
        assert!(file.write_at(b"x", 0).is_err() && file.set_len(1).is_err());
        assert_eq!(*open(sealed).unwrap(), b"secret");
    }

    #[test]
    fn anything_else_is_refused() {
        let unsealed = create().unwrap();
        let half = create().unwrap();
        fcntl_add_seals(&half, SealFlags::WRITE | SealFlags::SEAL).unwrap();
        let large = File::from(create().unwrap());
        large.set_len(MOST as u64 + 1).unwrap();
        fcntl_add_seals(&large, SEALS).unwrap();
        let file = tempfile::tempfile().unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for odd in [unsealed, half, large.into(), file.into(), socket.into()] {
            assert!(open(odd).is_err());
        }
    }
}
