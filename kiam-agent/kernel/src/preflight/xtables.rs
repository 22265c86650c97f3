//! Reads the rules that iptables' older kernel interface has (`iptables-legacy`).

use std::{
    fs, io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd as _,
};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES` of `linux/netfilter_ipv4/ip_tables.h`.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// The length of a table's name.
const NAME: usize = 32;
/// The length of `struct ipt_getinfo`, where its size of all entries is, and where these begin in `struct ipt_get_entries`.
const INFO: usize = 84;
const INFO_SIZE: usize = 80;
const ENTRIES: usize = 40;
/// In `struct ipt_entry`: the destination and its mask, where the target and the next entry begin.
const DESTINATION: usize = 4;
const MASK: usize = 12;
const TARGET_OFFSET: usize = 88;
const NEXT_OFFSET: usize = 90;
/// In `struct xt_entry_target`: its name, and where its data begin.
const TARGET_NAME: std::ops::Range<usize> = 2..31;
const TARGET_DATA: usize = 32;
/// The most bytes of a table: more than 100,000 rules have.
const LARGEST: usize = 64 << 20;

/// A rule.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// The network of destinations that it is for.
    pub(super) destination: (Ipv4Addr, Ipv4Addr),
    /// The target, such as `DNAT`; of the head of a chain `ERROR`.
    pub(super) target: String,
    /// The target's data.
    pub(super) data: Vec<u8>,
}

/// The rules of `table` in this thread's network namespace; none if nothing has made the table. To ask for a table that is
/// not there would make it.
///
/// # Errors
///
/// The kernel's, for example without `CAP_NET_ADMIN`.
pub(super) fn rules(table: &str) -> io::Result<Vec<Rule>> {
    let tables = match fs::read_to_string("/proc/thread-self/net/ip_tables_names") {
        Ok(tables) => tables,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if !tables.lines().any(|line| line == table) {
        return Ok(Vec::new());
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut info = vec![0; INFO];
    info[..table.len()].copy_from_slice(table.as_bytes());
    option(&socket, GET_INFO, &mut info)?;
    let size = number(&info, INFO_SIZE).unwrap_or_default() as usize;
    if size > LARGEST {
        return Err(io::Error::other(format!("the table {table} has {size} bytes")));
    }
    let mut entries = vec![0; ENTRIES + size];
    entries[..table.len()].copy_from_slice(table.as_bytes());
    entries[NAME..NAME + 4].copy_from_slice(&(size as u32).to_ne_bytes());
    option(&socket, GET_ENTRIES, &mut entries)?;
    Ok(parse(&entries[ENTRIES..]))
}

fn option(socket: &UdpSocket, name: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes to `buffer`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            name,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn parse(mut entries: &[u8]) -> Vec<Rule> {
    let mut rules = Vec::new();
    while let Some((rule, next)) = first(entries) {
        rules.push(rule);
        entries = &entries[next..];
    }
    rules
}

/// The first entry, and where the next one begins; `None` if there is none, or not a whole one.
fn first(entries: &[u8]) -> Option<(Rule, usize)> {
    let next = usize::from(short(entries, NEXT_OFFSET)?);
    let entry = entries.get(..next).filter(|entry| !entry.is_empty())?;
    let target = entry.get(usize::from(short(entry, TARGET_OFFSET)?)..)?;
    let name = target.get(TARGET_NAME)?.split(|byte| *byte == 0).next()?;
    let address =
        |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(entry.get(at..at + 4)?).ok()?));
    let rule = Rule {
        destination: (address(DESTINATION)?, address(MASK)?),
        target: String::from_utf8_lossy(name).into_owned(),
        data: target.get(TARGET_DATA..).unwrap_or_default().to_vec(),
    };
    Some((rule, next))
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_end_early_or_lead_nowhere_end_the_list() {
        let mut entry = vec![0_u8; 112 + 40];
        let length = entry.len() as u16;
        entry[DESTINATION..DESTINATION + 4].copy_from_slice(&[169, 254, 169, 254]);
        entry[MASK..MASK + 4].copy_from_slice(&[255; 4]);
        entry[TARGET_OFFSET..TARGET_OFFSET + 2].copy_from_slice(&112_u16.to_ne_bytes());
        entry[NEXT_OFFSET..NEXT_OFFSET + 2].copy_from_slice(&length.to_ne_bytes());
        entry[112 + 2..112 + 6].copy_from_slice(b"DNAT");
        let rule = &parse(&entry)[0];
        assert_eq!(rule.destination, ([169, 254, 169, 254].into(), [255; 4].into()));
        assert_eq!((rule.target.as_str(), rule.data.len()), ("DNAT", 8));
        assert_eq!(parse(&[entry.clone(), entry.clone()].concat()).len(), 2);
        for end in [0, 50, 111, 151] {
            assert_eq!(parse(&entry[..end]), []);
        }
        for (at, value) in [(NEXT_OFFSET, 0_u16), (NEXT_OFFSET, 4000), (TARGET_OFFSET, 4000)] {
            let mut broken = entry.clone();
            broken[at..at + 2].copy_from_slice(&value.to_ne_bytes());
            assert_eq!(parse(&broken), [], "{at}: {value}");
        }
    }
}
