//! The maximum session durations of roles, which AWS shows only by errors.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tracing::info;

use super::error::Failure;
use kiam_core::{
    credentials::{ErrorClass, SourceError},
    role::{RoleArn, RoleIdentity},
};

const HOUR: Duration = Duration::from_secs(3600);

/// The durations that are tried when a role's maximum is lower than requested. Every role allows an hour.
/// <https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html>
const STEPS: [Duration; 5] = [
    HOUR.saturating_mul(12),
    HOUR.saturating_mul(8),
    HOUR.saturating_mul(4),
    HOUR.saturating_mul(2),
    HOUR,
];

/// The maximum duration of chained sessions.
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles.html#iam-term-role-chaining>
pub const CHAINED: Duration = HOUR;

/// The time after which a longer session is tried again, since somebody may have raised the role's maximum.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The most roles whose maximum is kept. Beyond that the oldest is dropped and found again.
const MOST: usize = 1024;

/// The maximum durations of roles, as found so far.
#[derive(Default)]
pub(super) struct Durations(Mutex<HashMap<RoleArn, RoleMaximum>>);

#[derive(Clone, Copy)]
struct RoleMaximum {
    longest: Duration,
    at: Instant,
    /// The maximum that was logged last.
    logged: Option<Duration>,
}

// === impl Durations ===

impl Durations {
    /// Calls `ask` once, with the duration of `identity`, or with the role's known maximum if that is shorter. If the role
    /// allows less, the error is [`ErrorClass::TooLong`], and the next call requests a shorter duration. So each call is one
    /// that the caller has budgeted.
    pub(super) async fn fit<T, F>(
        &self,
        identity: &RoleIdentity,
        ask: impl FnOnce(Duration) -> F,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let role = &identity.role;
        let known = self.known(role);
        let duration = known.map_or(identity.duration, |longest| longest.min(identity.duration));
        let (next, error) = match ask(duration).await {
            Ok(answer) => {
                if duration < identity.duration && self.is_news(role) {
                    let [asked, used] =
                        [identity.duration, duration].map(humantime::format_duration);
                    info!(%role, %asked, %used, "Sessions of the role are shorter than requested");
                }
                return Ok(answer);
            }
            Err(Failure::Other(error)) => return Err(error),
            Err(Failure::TooLong(error)) => (shorter(duration), error),
            Err(Failure::Chained(error)) => ((duration > CHAINED).then_some(CHAINED), error),
        };
        let Some(next) = next else { return Err(error) };
        // At once, so that other sessions of the role need not find it too.
        self.learn(role, next);
        Err(SourceError { class: ErrorClass::TooLong, ..error })
    }

    fn known(&self, role: &RoleArn) -> Option<Duration> {
        self.lock().get(role).filter(|found| found.holds()).map(|found| found.longest)
    }

    /// Records that sessions last no longer than `longest`. The known maximum may be less.
    fn learn(&self, role: &RoleArn, longest: Duration) {
        let mut found = self.lock();
        let before = found.get(role).copied();
        let known = before.filter(RoleMaximum::holds).map_or(longest, |found| found.longest);
        let longest = longest.min(known);
        if found.len() >= MOST && !found.contains_key(role) {
            let first =
                found.iter().min_by_key(|(_, found)| found.at).map(|(role, _)| role.clone());
            first.map(|role| found.remove(&role));
        }
        let logged = before.and_then(|before| before.logged);
        found.insert(role.clone(), RoleMaximum { longest, at: Instant::now(), logged });
    }

    /// Whether the role's maximum was not logged yet. It is logged once.
    fn is_news(&self, role: &RoleArn) -> bool {
        let mut found = self.lock();
        found.get_mut(role).is_some_and(|found| {
            found.logged.replace(found.longest).is_none_or(|logged| logged != found.longest)
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RoleArn, RoleMaximum>> {
        // A panic leaves complete entries.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl RoleMaximum ===

impl RoleMaximum {
    fn holds(&self) -> bool {
        self.at.elapsed() < FORGET_AFTER
    }
}

impl fmt::Debug for Durations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Durations")
    }
}

fn shorter(duration: Duration) -> Option<Duration> {
    STEPS.into_iter().find(|step| *step < duration)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::role::SessionName;

    fn identity(role: &str, hours: u32) -> RoleIdentity {
        let role = format!("arn:aws:iam::123456789012:role/{role}").parse().unwrap();
        RoleIdentity::new(role, SessionName::sanitised("kiam-kiam"), HOUR * hours)
    }

    /// The hours that are asked for, in turn, of a role whose sessions last `longest` at most.
    async fn asked(durations: &Durations, identity: &RoleIdentity, longest: Duration) -> Vec<u64> {
        let asked = Mutex::new(Vec::new());
        loop {
            let ask = async |duration: Duration| {
                asked.lock().unwrap().push(duration.as_secs() / 3600);
                let error = SourceError { class: ErrorClass::Denied, message: String::new() };
                if duration > longest { Err(Failure::TooLong(error)) } else { Ok(()) }
            };
            let answer = durations.fit(identity, ask).await;
            if answer.as_ref().is_err_and(|error| error.class == ErrorClass::TooLong) {
                continue;
            }
            assert_eq!(answer.is_ok(), longest >= HOUR);
            return asked.into_inner().unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn longest_that_a_role_allows_is_found_used_and_sought_anew_after_a_day() {
        let (durations, long) = (Durations::default(), identity("long", 12));
        assert_eq!(asked(&durations, &long, HOUR * 5).await, [12, 8, 4]);
        assert_eq!(asked(&durations, &long, HOUR * 5).await, [4]);
        assert_eq!(asked(&durations, &identity("other", 6), HOUR * 5).await, [6, 4]);
        assert_eq!(asked(&durations, &identity("long", 2), HOUR * 5).await, [2]);
        assert_eq!(asked(&durations, &long, HOUR * 3).await, [4, 2], "it was lowered");
        tokio::time::advance(HOUR * 23).await;
        assert_eq!(asked(&durations, &long, HOUR * 3).await, [2]);
        tokio::time::advance(HOUR * 2).await;
        assert_eq!(asked(&durations, &long, HOUR * 12).await, [12], "it was raised");
        assert_eq!(asked(&durations, &identity("none", 3), Duration::ZERO).await, [3, 2, 1]);
    }

    #[tokio::test]
    async fn what_is_known_already_is_no_news() {
        let (durations, role) = (Durations::default(), identity("long", 12).role);
        assert!(!durations.is_news(&role));
        durations.learn(&role, HOUR * 4);
        assert_eq!([durations.is_news(&role), durations.is_news(&role)], [true, false]);
        durations.learn(&role, HOUR * 4);
        assert!(!durations.is_news(&role), "it is the same");
        durations.learn(&role, HOUR * 8);
        assert_eq!(durations.known(&role), Some(HOUR * 4), "the refusal of a longer one came late");
    }

    #[tokio::test(start_paused = true)]
    async fn what_one_session_is_refused_no_other_of_the_role_asks_for() {
        let (durations, long) = (Durations::default(), identity("long", 12));
        let refused = async |_| -> Result<(), Failure> {
            let error = SourceError { class: ErrorClass::Denied, message: String::new() };
            Err(Failure::TooLong(error))
        };
        durations.fit(&long, refused).await.unwrap_err();
        assert_eq!(asked(&durations, &long, HOUR).await, [8, 4, 2, 1], "12 was refused already");
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_roles_as_there_is_room_for_are_kept_and_the_first_goes() {
        let durations = Durations::default();
        for n in 0..=MOST {
            tokio::time::advance(Duration::from_secs(1)).await;
            let found = asked(&durations, &identity(&format!("r{n}"), 2), HOUR).await;
            assert_eq!(found, [2, 1]);
        }
        assert_eq!(durations.lock().len(), MOST);
        assert_eq!(asked(&durations, &identity("r1", 2), HOUR).await, [1]);
        assert_eq!(asked(&durations, &identity("r0", 2), HOUR).await, [2, 1]);
    }
}
