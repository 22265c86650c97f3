//! The account's STS.

use std::{ops::Range, time::Duration};

use kiam_core::{
    credentials::ErrorClass,
    rate::{Bucket, Rate},
};
use tokio::time::Instant;

/// What STS does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Answer {
    Issued,
    /// The quota is used up. Such a call takes nothing from it.
    Throttled,
    /// STS is not there.
    Down,
}

/// One account in one region. Throttles by a token bucket, as AWS says that it does.
#[derive(Debug)]
pub(crate) struct Account {
    rate: Rate,
    bucket: Bucket,
    start: Instant,
    /// When nothing is answered, since the start.
    outage: Range<Duration>,
}

// === impl Account ===

impl Account {
    pub(crate) fn new(rate: Rate, start: Instant, outage: Range<Duration>) -> Self {
        Self { rate, bucket: Bucket::default(), start, outage }
    }

    pub(crate) fn ask(&mut self, now: Instant) -> Answer {
        if self.outage.contains(&now.duration_since(self.start)) {
            return Answer::Down;
        }
        if !self.bucket.wait(self.rate, now).is_zero() {
            return Answer::Throttled;
        }
        self.bucket.take(self.rate, now);
        Answer::Issued
    }
}

// === impl Answer ===

impl Answer {
    /// How the agent classes it, if it is an error.
    pub(crate) fn error(self) -> Option<ErrorClass> {
        match self {
            Self::Issued => None,
            Self::Throttled => Some(ErrorClass::Throttled),
            Self::Down => Some(ErrorClass::Retryable),
        }
    }
}
