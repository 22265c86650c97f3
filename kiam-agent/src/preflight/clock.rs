//! The node's clock, beside those of servers that were asked anyway.

use std::time::{Duration, SystemTime};

use kiam_core::preflight::{Check, Topic::Clock};

/// The most by which AWS accepts a signature's time to differ
/// (<https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html>).
const REJECTED: Duration = Duration::from_secs(300);
/// A difference that nobody has whose clock is synchronised.
const STRANGE: Duration = Duration::from_secs(60);

/// A server's clock, as its answer had it, and the node's at that time.
#[derive(Clone, Debug)]
pub(super) struct ServerClock {
    server: &'static str,
    theirs: SystemTime,
    ours: SystemTime,
}

// === impl ServerClock ===

impl ServerClock {
    /// A reading by the header `Date`; `None` if that is no date.
    pub(super) fn read(server: &'static str, date: Option<&str>, ours: SystemTime) -> Option<Self> {
        let theirs = jiff::fmt::rfc2822::parse(date?).ok()?.timestamp();
        Some(Self { server, theirs: theirs.into(), ours })
    }

    /// By how much the node's clock is ahead of the server's, or behind.
    fn difference(&self) -> (Duration, &'static str) {
        match self.ours.duration_since(self.theirs) {
            Ok(ahead) => (ahead, "ahead of"),
            Err(behind) => (behind.duration(), "behind"),
        }
    }
}

/// Judges the largest difference.
pub(super) fn check(clocks: &[ServerClock]) -> Check {
    let Some(worst) = clocks.iter().max_by_key(|clock| clock.difference().0) else {
        return Check::unknown(
            Clock,
            "no server answered with its time",
            "see imds and api; `timedatectl` on the node says whether its clock is synchronised",
        );
    };
    let (difference, direction) = worst.difference();
    let seconds = difference.as_secs();
    let finding = format!("{seconds} s {direction} the clock of {}", worst.server);
    let remedy = "synchronise the node's clock: chrony with 169.254.169.123 on EC2";
    match difference {
        difference if difference > REJECTED => {
            Check::fail(Clock, format!("{finding}; STS rejects what this node signs"), remedy)
        }
        difference if difference > STRANGE => Check::warn(Clock, finding, remedy),
        _ => Check::ok(Clock, format!("within a minute of {}", names(clocks))),
    }
}

/// The servers whose clocks were compared.
fn names(clocks: &[ServerClock]) -> String {
    let servers: Vec<_> = clocks.iter().map(|clock| clock.server).collect();
    match servers.split_last() {
        Some((last, [])) => format!("the clock of {last}"),
        Some((last, others)) => format!("the clocks of {} and {last}", others.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Fail, Ok as Good, Unknown, Warn};

    use super::*;

    #[test]
    fn the_largest_difference_counts_either_way() {
        let date = "Tue, 15 Nov 1994 08:12:31 GMT";
        let theirs = SystemTime::UNIX_EPOCH + Duration::from_secs(784_887_151);
        let ahead = |seconds: u64| theirs + Duration::from_secs(seconds);
        let behind = |seconds: u64| theirs.checked_sub(Duration::from_secs(seconds)).unwrap();
        for (ours, verdict, says) in [
            (theirs, Good, "of the clocks of the metadata service and the Kubernetes API"),
            (ahead(60), Good, "within a minute of the clocks of the metadata service and"),
            (ahead(61), Warn, "61 s ahead of the clock of the Kubernetes API"),
            (behind(300), Warn, "300 s behind"),
            (behind(301), Fail, "301 s behind"),
            (ahead(86_400), Fail, "STS rejects"),
        ] {
            let near = ServerClock::read("the metadata service", Some(date), theirs).unwrap();
            let far = ServerClock::read("the Kubernetes API", Some(date), ours).unwrap();
            let check = check(&[near, far]);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.finding.contains(says), "{check:?}");
        }
        let alone = ServerClock::read("the metadata service", Some(date), theirs).unwrap();
        let alone = check(&[alone]);
        assert!(alone.finding.ends_with("of the clock of the metadata service"), "{alone:?}");
        assert_eq!(check(&[]).verdict, Unknown);
        for date in [None, Some("yesterday")] {
            assert!(ServerClock::read("a", date, theirs).is_none());
        }
    }
}
