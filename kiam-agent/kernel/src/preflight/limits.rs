//! Limits of inotify, which count all that root runs on the node.

use std::{fs, io};

use kiam_core::preflight::{Check, Topic::Inotify};

/// The watches of a full node: those of 250 pods with three containers, two for a pod and two for each container.
const FULL_NODE: u64 = 250 * (2 + 3 * 2);

/// Judges the limits, and what came of a try of some watches.
pub(super) fn inotify(tried: &io::Result<usize>) -> Check {
    let limit = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/proc/sys/fs/inotify/{name}")).ok()?.trim().parse().ok()
    };
    judge(tried, limit("max_user_watches"), limit("max_user_instances"))
}

fn judge(tried: &io::Result<usize>, watches: Option<u64>, instances: Option<u64>) -> Check {
    let shown = |limit: Option<u64>| limit.map_or("?".to_owned(), |limit| limit.to_string());
    let (watched, made) = (shown(watches), shown(instances));
    match tried {
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => Check::fail(
            Inotify,
            format!("no instance is left of fs.inotify.max_user_instances = {made}"),
            "raise fs.inotify.max_user_instances on the node, for example to 8192",
        ),
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Check::fail(
            Inotify,
            format!("no watch is left of fs.inotify.max_user_watches = {watched}"),
            "raise fs.inotify.max_user_watches on the node, for example to 65536",
        ),
        Err(error) => Check::fail(
            Inotify,
            format!("inotify does not work: {error}"),
            "look for a seccomp filter or a security module that forbids it",
        ),
        Ok(_) if watches.is_some_and(|limit| limit < FULL_NODE) => Check::warn(
            Inotify,
            format!(
                "fs.inotify.max_user_watches = {watched}, and the agent of a full node needs {FULL_NODE}: new pods would be denied for up to 2 s"
            ),
            "raise fs.inotify.max_user_watches on the node, for example to 65536",
        ),
        Ok(tried) => Check::ok(
            Inotify,
            format!("{tried} watches were tried; the limits are {watched}, and {made} instances"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{self, Fail, Ok as Good, Warn};

    use super::*;

    #[test]
    fn used_up_and_low_limits_are_told_apart() {
        let errno = |number| Err(io::Error::from_raw_os_error(number));
        let cases: [(io::Result<usize>, u64, Verdict, &str); 5] = [
            (Ok(7), 65_536, Good, "7 watches"),
            (Ok(7), FULL_NODE - 1, Warn, "needs 2000"),
            (errno(libc::EMFILE), 65_536, Fail, "max_user_instances = 128"),
            (errno(libc::ENOSPC), 65_536, Fail, "max_user_watches = 65536"),
            (errno(libc::EPERM), 65_536, Fail, "does not work"),
        ];
        for (tried, watches, verdict, says) in cases {
            let check = judge(&tried, Some(watches), Some(128));
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.finding.contains(says), "{check:?}");
        }
        assert!(judge(&Ok(0), None, None).finding.contains("are ?"), "an unreadable limit");
    }
}
