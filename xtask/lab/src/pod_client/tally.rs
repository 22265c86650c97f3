//! Many attempts from many threads, told as counts.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Attempt, Options, attempt};

/// What came of many attempts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Those that got credentials, by access key.
    pub keys: BTreeMap<String, u64>,
    /// The others, by what ended them: `connect ECONNREFUSED`, `get 403`.
    pub failures: BTreeMap<String, u64>,
    /// The time of the longest, from before its connect.
    pub slowest_micros: u64,
}

// === impl Tally ===

impl Tally {
    /// How many there were.
    #[must_use]
    pub fn attempts(&self) -> u64 {
        self.keys.values().chain(self.failures.values()).sum()
    }

    fn add(&mut self, attempt: &Attempt) {
        self.slowest_micros = self.slowest_micros.max(attempt.micros);
        let count = match (attempt.status, attempt.field("AccessKeyId")) {
            (Some(200), Some(key)) => self.keys.entry(key),
            (status, _) => {
                let status = status.map(|status| status.to_string()).unwrap_or_default();
                let what = attempt.error.as_ref().unwrap_or(&status);
                self.failures.entry(format!("{} {what}", attempt.step))
            }
        };
        *count.or_default() += 1;
    }

    /// Adds those of another.
    pub fn merge(&mut self, other: Self) {
        for (key, count) in other.keys {
            *self.keys.entry(key).or_default() += count;
        }
        for (failure, count) in other.failures {
            *self.failures.entry(failure).or_default() += count;
        }
        self.slowest_micros = self.slowest_micros.max(other.slowest_micros);
    }
}

/// Asks from `threads` threads, `options.repeat` times from each and on until stdin ends, and prints the tally.
pub(super) fn main(options: &Options, threads: u32) -> Result<()> {
    let ended = AtomicBool::new(false);
    let tally = thread::scope(|scope| {
        let asking: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| repeat(options, &ended))).collect();
        let read = io::copy(&mut io::stdin().lock(), &mut io::sink());
        ended.store(true, Ordering::Relaxed);
        let mut tally = Tally::default();
        for asked in asking {
            tally.merge(asked.join().expect("an attempt that fails is counted"));
        }
        read.map(|_| tally)
    });
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &tally.context("reading stdin")?).context("printing")?;
    stdout.write_all(b"\n").context("printing")
}

fn repeat(options: &Options, ended: &AtomicBool) -> Tally {
    let mut tally = Tally::default();
    let mut done = 0;
    while done < options.repeat || !ended.load(Ordering::Relaxed) {
        if done > 0 && options.pause_ms > 0 {
            thread::sleep(Duration::from_millis(options.pause_ms));
        }
        tally.add(&attempt(options));
        done += 1;
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_counted_by_key_or_by_what_ended_them() {
        let answer = |status, body: &str| Attempt {
            step: "get".to_owned(),
            status: Some(status),
            body: body.to_owned(),
            ..Attempt::default()
        };
        let cut = Attempt {
            step: "connect".to_owned(),
            error: Some("EPERM".to_owned()),
            micros: 7,
            ..Attempt::default()
        };
        let mut tally = Tally::default();
        let credentials = "{\"AccessKeyId\":\"ASIA1\"}";
        for attempt in [answer(200, credentials), answer(200, "?"), answer(403, credentials), cut] {
            tally.add(&attempt);
        }
        let mut twice = tally.clone();
        twice.merge(tally);
        let count = |key: &str| (key.to_owned(), 2);
        assert_eq!(twice.keys, [count("ASIA1")].into());
        assert_eq!(
            twice.failures,
            [count("connect EPERM"), count("get 200"), count("get 403")].into()
        );
        assert_eq!((twice.attempts(), twice.slowest_micros), (8, 7));
    }
}
