//! `BPF_MAP_LOOKUP_BATCH`, which aya 0.14 does not offer: the entries of a hash map by one call.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use aya::Pod;

use super::links::{Attributes, bpf};

const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
/// The most entries of one call: more than the pods of a node, and more than fall into one bucket.
const ENTRIES: usize = 512;

/// `union bpf_attr`, the part for batches.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

// SAFETY: the fields are those of the kernel's union, without padding. `entries`, which alone builds one, has the pointers
// point at buffers that outlive the call.
unsafe impl Attributes for Batch {}

/// All entries of the hash map `map`, whose keys are `K` and values `V`. What changes meanwhile may be missing or be there
/// twice. Kernel 5.6.
pub(crate) fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    // Where the next batch begins: the number of a bucket.
    let (mut position, mut next) = (0_u32, 0_u32);
    let mut begun = false;
    let mut keys: Vec<K> = Vec::with_capacity(ENTRIES);
    let mut values: Vec<V> = Vec::with_capacity(ENTRIES);
    loop {
        let mut attr = Batch {
            in_batch: if begun { (&raw const position).expose_provenance() as u64 } else { 0 },
            out_batch: (&raw mut next).expose_provenance() as u64,
            keys: keys.as_mut_ptr().expose_provenance() as u64,
            values: values.as_mut_ptr().expose_provenance() as u64,
            count: ENTRIES as u32,
            map_fd: map.as_raw_fd().unsigned_abs(),
            elem_flags: 0,
            flags: 0,
        };
        let ended = match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            // The last batch.
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        let count = (attr.count as usize).min(ENTRIES);
        // SAFETY: the kernel has written `count` keys, each of the map's key size, into the room for `ENTRIES` of them; any
        // bytes are a `Pod`.
        unsafe { keys.set_len(count) };
        // SAFETY: as above.
        unsafe { values.set_len(count) };
        entries.extend(keys.drain(..).zip(values.drain(..)));
        if ended {
            return Ok(entries);
        }
        (position, begun) = (next, true);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};

    use aya::maps::{HashMap, Map, MapData};

    use super::*;

    const BPF_MAP_CREATE: libc::c_int = 0;
    const BPF_MAP_TYPE_HASH: u32 = 1;

    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }

    // SAFETY: the fields are those of the kernel's union, without padding or pointers.
    unsafe impl Attributes for Create {}

    /// An empty map of hashes, with keys and values of these sizes.
    pub(crate) fn hash_map(key_size: u32, value_size: u32) -> OwnedFd {
        let map_type = BPF_MAP_TYPE_HASH;
        let mut create = Create { map_type, key_size, value_size, max_entries: 4096 };
        let map = bpf(BPF_MAP_CREATE, &mut create).unwrap();
        // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
        unsafe { OwnedFd::from_raw_fd(map) }
    }

    #[test]
    fn all_entries_come_however_many_there_are() {
        if lab::skip!() {
            return;
        }
        let map = hash_map(8, 8);
        let table = MapData::from_fd(map.try_clone().unwrap()).unwrap();
        let mut table = HashMap::<_, u64, u64>::try_from(Map::HashMap(table)).unwrap();
        assert_eq!(entries::<u64, u64>(map.as_fd()).unwrap(), []);
        for number in 0..2000 {
            table.insert(number, 2 * number, 0).unwrap();
        }
        let mut all = entries::<u64, u64>(map.as_fd()).unwrap();
        all.sort_unstable();
        assert_eq!(all, (0..2000).map(|number| (number, 2 * number)).collect::<Vec<_>>());
    }
}
