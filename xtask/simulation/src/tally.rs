//! What happened, counted.

use std::ops::Range;

use crate::account::Answer;

/// Milliseconds since the simulation began.
pub(crate) type Millis = u64;

/// A time during which a wanted session was not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) from: Millis,
    pub(crate) until: Millis,
    /// Whether it had been held before: it expired.
    pub(crate) lapsed: bool,
}

/// Calls by the second, and gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Calls in each second, whatever was answered.
    calls: Vec<u32>,
    /// Of these, the throttled ones.
    throttled: Vec<u32>,
    pub(crate) gaps: Vec<Gap>,
    /// Renewals, by how much life was left, in milliseconds; the least that any had.
    pub(crate) least_left: Option<Millis>,
}

/// How often something was called in a second.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spread {
    pub(crate) mean: f64,
    pub(crate) p50: u32,
    pub(crate) p99: u32,
    /// The worst second.
    pub(crate) second: u32,
    /// A second's mean in the worst minute.
    pub(crate) minute: f64,
    /// Calls in all.
    pub(crate) total: u64,
    /// Share of them that were throttled.
    pub(crate) throttled: f64,
}

// === impl Tally ===

impl Tally {
    pub(crate) fn called(&mut self, at: Millis, answer: Answer) {
        let second = second(at);
        if self.calls.len() <= second {
            self.calls.resize(second + 1, 0);
            self.throttled.resize(second + 1, 0);
        }
        self.calls[second] += 1;
        self.throttled[second] += u32::from(answer == Answer::Throttled);
    }

    pub(crate) fn renewed(&mut self, left: Millis) {
        self.least_left = Some(self.least_left.map_or(left, |least| least.min(left)));
    }

    /// The calls of each second in `range`.
    pub(crate) fn spread(&self, range: Range<Millis>) -> Spread {
        let seconds = second(range.end) - second(range.start);
        let window = |counts: &[u32]| -> Vec<u32> {
            let within = counts.iter().skip(second(range.start)).take(seconds).copied();
            within.chain(std::iter::repeat(0)).take(seconds).collect()
        };
        let calls = window(&self.calls);
        let total: u64 = calls.iter().map(|count| u64::from(*count)).sum();
        let throttled: u64 = window(&self.throttled).iter().map(|count| u64::from(*count)).sum();
        let minute = calls.chunks_exact(60).map(|minute| minute.iter().sum::<u32>()).max();
        let mut sorted = calls.clone();
        sorted.sort_unstable();
        let at = |share: f64| quantile(&sorted, share).unwrap_or(0);
        Spread {
            mean: total as f64 / seconds.max(1) as f64,
            p50: at(0.5),
            p99: at(0.99),
            second: at(1.0),
            minute: f64::from(minute.unwrap_or(0)) / 60.0,
            total,
            throttled: if total == 0 { 0.0 } else { throttled as f64 / total as f64 },
        }
    }
}

fn second(at: Millis) -> usize {
    usize::try_from(at / 1000).expect("a simulation ends within the machine's numbers")
}

/// The value that `share` of all are at most.
pub(crate) fn quantile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get(((last as f64) * share).round() as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_of_the_window_alone_and_counts_idle_seconds() {
        let mut tally = Tally::default();
        tally.called(500, Answer::Issued);
        (0..6).for_each(|_| tally.called(61_000, Answer::Issued));
        (0..2).for_each(|_| tally.called(62_999, Answer::Throttled));
        let spread = tally.spread(60_000..180_000);
        assert_eq!((spread.total, spread.second, spread.p50), (8, 6, 0));
        assert!((spread.mean - 8.0 / 120.0).abs() < 1e-9, "{spread:?}");
        assert!((spread.minute - 8.0 / 60.0).abs() < 1e-9, "{spread:?}");
        assert!((spread.throttled - 0.25).abs() < 1e-9, "{spread:?}");
    }
}
