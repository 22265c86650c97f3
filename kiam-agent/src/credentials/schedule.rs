//! When what is due: pure functions of times.

use std::time::{Duration, SystemTime};

use super::{Credentials, ErrorClass};

/// Credentials with less life than this are renewed before anything else: SDKs refresh at 15 minutes, and
/// botocore moves a shorter expiry ahead by itself and then signs with expired keys.
pub(super) const FLOOR: Duration = Duration::from_secs(15 * 60);

/// Whether AWS still takes them.
pub(super) fn valid(credentials: &Credentials, now: SystemTime) -> bool {
    now < credentials.expires
}

/// When they are to be renewed: at half their life, or a floor before their end where that is sooner than
/// half, but never at once again, so that short sessions don't make a storm.
pub(super) fn refresh_at(issued: SystemTime, expires: SystemTime) -> SystemTime {
    let life = expires.duration_since(issued).unwrap_or_default();
    let half = issued + life / 2;
    let floor = expires.checked_sub(FLOOR).unwrap_or(issued);
    let soonest = issued + life / 4;
    half.min(floor).max(soonest)
}

/// How long to wait after the `failures`th failure in a row, before jitter.
pub(super) fn backoff(class: ErrorClass, failures: u32) -> Duration {
    let (first, last) = match class {
        ErrorClass::Retryable => (1, 60),
        ErrorClass::Throttled => (5, 120),
        ErrorClass::Denied => (15, 600),
    };
    let factor = 1_u64 << failures.saturating_sub(1).min(10);
    Duration::from_secs((first * factor).min(last))
}

/// Between three quarters and five quarters of `duration`.
pub(super) fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_half_life_with_a_floor() {
        let issued = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        // Life, and when it is renewed after it was issued.
        for (life, renewed) in [(60, 30), (720, 360), (20, 5), (15, 3), (0, 0)] {
            let at = refresh_at(issued, issued + minutes(life)).duration_since(issued).unwrap();
            assert!(at >= minutes(renewed) && at <= minutes(renewed + 1), "{life}: {at:?}");
        }
    }

    #[test]
    fn backoff_grows_to_its_class_limit() {
        let seconds = |class, failures| backoff(class, failures).as_secs();
        assert_eq!([1, 2, 3, 99].map(|n| seconds(ErrorClass::Retryable, n)), [1, 2, 4, 60]);
        assert_eq!([1, 99].map(|n| seconds(ErrorClass::Throttled, n)), [5, 120]);
        assert_eq!([1, 99].map(|n| seconds(ErrorClass::Denied, n)), [15, 600]);
    }
}
