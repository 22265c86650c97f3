//! The allocator's habits.

#[cfg(target_env = "gnu")]
use std::ffi::c_int;

/// The arenas among which threads are divided. Each keeps of its own what its threads free.
#[cfg(target_env = "gnu")]
const ARENAS: c_int = 2;
/// The size in bytes from which a block is a mapping of its own, which is given back when it is freed.
#[cfg(target_env = "gnu")]
const MAPPED: c_int = 128 * 1024;
/// The free bytes at the top of the heap that are kept.
#[cfg(target_env = "gnu")]
const KEPT: c_int = 64 * 1024;

/// Has the allocator give freed memory back, and says whether it will. To be called before there are other threads.
///
/// By default glibc makes up to eight arenas a processor, and the first freed block of megabytes, such as a list of pods,
/// raises the size from which blocks are mapped for as long as the process lives: see mallopt(3). Other allocators are left
/// as they are.
pub fn give_memory_back() -> bool {
    #[cfg(target_env = "gnu")]
    {
        let options = [
            (libc::M_ARENA_MAX, ARENAS),
            (libc::M_MMAP_THRESHOLD, MAPPED),
            (libc::M_TRIM_THRESHOLD, KEPT),
        ];
        options.into_iter().all(|(option, value)| {
            // SAFETY: mallopt takes two numbers, and glibc locks what it changes.
            unsafe { libc::mallopt(option, value) == 1 }
        })
    }
    #[cfg(not(target_env = "gnu"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The resident memory of this process, in bytes.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    #[test]
    fn large_blocks_are_given_back_also_after_the_first() {
        assert!(give_memory_back());
        let (block, count) = (1 << 20, 128);
        let filled = || (0..count).map(|_| vec![1_u8; block]).collect::<Vec<_>>();
        // The first raises the threshold, where that is not fixed.
        drop(vec![1_u8; 16 * block]);
        let before = resident();
        let mut blocks = filled();
        assert!(resident() > before + count * block / 2, "they are there");
        // What lies above them in the heap would keep them there.
        let last = blocks.pop();
        drop(blocks);
        assert!(resident() < before + count * block / 4, "{} more", resident() - before);
        drop(last);
    }
}
