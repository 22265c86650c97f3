//! The times of renewals and retries: pure functions.
//!
//! Two clocks are read, and the one that shows less life counts. AWS and the pods use the wall clock, but it may be
//! stepped. After a step forward cached credentials look expired, to SDKs too, so that they are renewed at once and not
//! served. After a step back only the monotonic clock shows that they have expired.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{Credentials, ErrorClass};

/// Credentials with less life than this are renewed before anything else: SDKs refresh at 15 minutes, and
/// botocore moves a shorter expiry ahead by itself and then signs with expired keys.
const FLOOR: Duration = Duration::from_secs(15 * 60);

/// The shortest time between renewals. Where the node's clock is wrong, credentials may seem to live for seconds.
pub(super) const SOONEST: Duration = Duration::from_secs(10);

/// The lifetime of credentials.
#[derive(Clone, Copy, Debug)]
pub(super) struct Term {
    issued: SystemTime,
    expires: SystemTime,
    /// When they were requested, by the monotonic clock.
    begun: Instant,
    life: Duration,
    /// As for [`refresh_after`].
    draw: f64,
}

// === impl Term ===

impl Term {
    /// The term of `credentials` that were requested at `begun`, for a session of at most `longest`; `draw` as for
    /// [`refresh_after`].
    pub(super) fn new(
        credentials: &Credentials,
        begun: Instant,
        longest: Duration,
        draw: f64,
    ) -> Self {
        let Credentials { issued, expires, .. } = *credentials;
        // Never longer than requested: more means that the node's clock was slow.
        let life = expires.duration_since(issued).unwrap_or_default().min(longest);
        Self { issued, expires, begun, life, draw }
    }

    /// The time since they were requested, by the monotonic clock.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.begun)
    }

    /// The random number for [`refresh_after`].
    pub(super) fn draw(&self) -> f64 {
        self.draw
    }

    /// The time until they expire; zero when they have expired.
    pub(super) fn left(&self, wall: SystemTime, now: Instant) -> Duration {
        let by_wall = self.expires.duration_since(wall).unwrap_or_default();
        by_wall.min((self.begun + self.life).saturating_duration_since(now))
    }

    /// Whether less than a quarter of their life is left, though they are renewed by 60 % of it.
    pub(super) fn is_overdue(&self, wall: SystemTime, now: Instant) -> bool {
        self.left(wall, now) < self.life / 4
    }

    /// The time until their renewal.
    pub(super) fn refresh_in(&self, wall: SystemTime, now: Instant) -> Duration {
        let by_wall = wall.duration_since(self.issued).unwrap_or_default();
        refresh_after(self.life, self.draw).saturating_sub(by_wall.max(self.age(now)))
    }
}

/// The age at which credentials with this `life` are renewed: between 40 and 60 % of it, or [`FLOOR`] before its end
/// where that is sooner, but never below 20 %, so that short sessions cause no storm. `draw`, between 0 and 1, is drawn
/// once for each, so that credentials that were fetched together are renewed apart.
#[must_use]
pub fn refresh_after(life: Duration, draw: f64) -> Duration {
    let latest = (life * 3 / 5).min(life.saturating_sub(FLOOR)).max(life * 3 / 10);
    let earliest = latest * 2 / 3;
    earliest + (latest - earliest).mul_f64(draw.clamp(0.0, 1.0))
}

/// The backoff after the `failures`th failure in a row, without jitter.
#[must_use]
pub fn backoff(class: ErrorClass, failures: u32) -> Duration {
    let (first, last) = match class {
        ErrorClass::Retryable | ErrorClass::TooLong => (1, 60),
        ErrorClass::Throttled => (5, 120),
        ErrorClass::Denied => (15, 600),
        ErrorClass::Refused => (1, 600),
    };
    let factor = 1_u64 << failures.saturating_sub(1).min(10);
    Duration::from_secs((first * factor).min(last))
}

/// `duration` with jitter: between three quarters and five quarters of it.
#[must_use]
pub fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn renewal_is_around_half_life_with_a_floor() {
        // Minutes of life, and of the age at which it is renewed: at the earliest, and at the latest.
        let cases =
            [(60, 24, 36), (720, 288, 432), (30, 10, 15), (20, 4, 6), (10, 2, 3), (0, 0, 0)];
        for (life, earliest, latest) in cases {
            let at = |draw| refresh_after(MINUTE * life, draw);
            assert_eq!((at(0.0), at(1.0)), (MINUTE * earliest, MINUTE * latest), "{life}");
            assert_eq!(at(0.5), (at(0.0) + at(1.0)) / 2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_that_shows_less_life_counts() {
        let (issued, begun) = (SystemTime::UNIX_EPOCH + MINUTE * 1_000_000, Instant::now());
        let role = "arn:aws:iam::123456789012:role/a".parse().unwrap();
        let credentials = Credentials::test(&role, "ASIA", issued, MINUTE * 60);
        let term = Term::new(&credentials, begun, MINUTE * 60, 0.5);
        // Minutes of age by the wall clock and by the other, of life left, and until the renewal.
        let cases = [
            (0, 0, 60, 30),
            (20, 20, 40, 10),
            (80, 20, 0, 0),
            (25, 10, 35, 5),
            (-40, 20, 40, 10),
            (-40, 45, 15, 0),
            (0, 60, 0, 0),
        ];
        for (wall, age, left, refresh) in cases {
            let distance = MINUTE * i32::unsigned_abs(wall);
            let wall_now = if wall < 0 { issued - distance } else { issued + distance };
            let now = begun + MINUTE * age;
            let found = (term.left(wall_now, now), term.refresh_in(wall_now, now));
            assert_eq!(found, (MINUTE * left, MINUTE * refresh), "{wall} {age}");
        }
        // Asked of AWS by a clock that was half an hour slow.
        let slow = Term::new(&credentials, begun, MINUTE * 30, 0.5);
        assert_eq!(slow.left(issued, begun), MINUTE * 30);
    }

    #[test]
    fn backoff_grows_to_its_class_limit() {
        let seconds = |class, failures| backoff(class, failures).as_secs();
        assert_eq!([1, 2, 3, 99].map(|n| seconds(ErrorClass::Retryable, n)), [1, 2, 4, 60]);
        assert_eq!([1, 99].map(|n| seconds(ErrorClass::Throttled, n)), [5, 120]);
        assert_eq!([1, 99].map(|n| seconds(ErrorClass::Denied, n)), [15, 600]);
        assert_eq!([1, 2, 3, 10, 99].map(|n| seconds(ErrorClass::Refused, n)), [1, 2, 4, 512, 600]);
    }
}
