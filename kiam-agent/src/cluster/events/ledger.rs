//! Decides when each trouble is reported, and reported again, by pure functions of the time.
//!
//! The one rule: nothing is queued. A trouble that can't be reported yet is found again by later scans, and reported
//! when the limits allow it, if it still exists.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::trouble::{PresentTrouble, Subject, Trouble};
use kiam_core::rate::{Bucket, Rate};

/// The time between two reports of a trouble that lasts. The API server deletes an Event an hour after its last write.
const REPEAT_INTERVAL: Duration = Duration::from_secs(30 * 60);

/// The shortest time between two reports of a trouble that ended and returned.
const RETURN_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How long a trouble that ended is remembered: as long as its Event exists.
const RETENTION: Duration = Duration::from_secs(3600);

/// The limit of all Events of this node. When STS fails everywhere, 5,000 nodes write 500 a second.
const NODE: Rate = Rate { burst: 10, period: Duration::from_secs(10) };

/// The limit of Events about one pod or namespace.
const SUBJECT: Rate = Rate { burst: 3, period: Duration::from_secs(5 * 60) };

/// The reports of each trouble. Memory grows with the present troubles and those reported within [`RETENTION`].
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: BTreeMap<Trouble, Entry>,
    /// When a trouble of this reason began, whatever its note: errors of one cause may differ in their text.
    since: HashMap<(Subject, &'static str), Instant>,
    node: Bucket,
    subjects: HashMap<Subject, Bucket>,
}

#[derive(Debug)]
struct Entry {
    patience: Duration,
    once: bool,
    present: bool,
    last_report: Option<Report>,
}

#[derive(Clone, Copy, Debug)]
struct Report {
    at: Instant,
    count: i32,
    /// Whether the trouble ended since.
    ended: bool,
}

/// The changes since the last scan.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// New troubles.
    pub(super) troubles: Vec<Trouble>,
    /// How many troubles ended before the limits allowed a report.
    pub(super) dropped: u64,
}

// === impl Ledger ===

impl Ledger {
    /// Takes the present troubles.
    pub(super) fn take(&mut self, present: Vec<PresentTrouble>, now: Instant) -> Changes {
        let mut changes = Changes::default();
        let before = std::mem::take(&mut self.since);
        self.entries.values_mut().for_each(|entry| entry.present = false);
        for PresentTrouble { trouble, patience, once } in present {
            let kind = (trouble.subject.clone(), trouble.reason);
            let since = before.get(&kind).copied().unwrap_or(now);
            self.since.insert(kind, since);
            let entry = self.entries.entry(trouble.clone()).or_insert_with(|| {
                changes.troubles.push(trouble);
                Entry { patience, once, present: true, last_report: None }
            });
            entry.present = true;
        }
        self.entries.retain(|trouble, entry| match (&mut entry.last_report, entry.present) {
            (_, true) => true,
            (Some(report), false) => {
                report.ended = true;
                now.duration_since(report.at) < RETENTION
            }
            (None, false) => {
                let due = before.get(&(trouble.subject.clone(), trouble.reason));
                let was_due = due.is_some_and(|since| now.duration_since(*since) >= entry.patience);
                changes.dropped += u64::from(was_due);
                false
            }
        });
        self.subjects.retain(|_, bucket| !bucket.is_full(now));
        changes
    }

    /// The trouble that is due for a report, with the report's number, until [`Ledger::record`] records it. New troubles
    /// come first, then those with the oldest reports.
    pub(super) fn next(&mut self, now: Instant) -> Option<(Trouble, i32)> {
        if !self.node.wait(NODE, now).is_zero() {
            return None;
        }
        let allowed = |subject: &Subject| {
            self.subjects.get(subject).is_none_or(|bucket| bucket.wait(SUBJECT, now).is_zero())
        };
        let due = self.entries.iter().filter(|(trouble, entry)| {
            let since = self.since.get(&(trouble.subject.clone(), trouble.reason));
            let since = since.copied().unwrap_or(now);
            entry.is_due(&trouble.subject, since, now) && allowed(&trouble.subject)
        });
        let (trouble, entry) =
            due.min_by_key(|(_, entry)| (entry.once, entry.last_report.map(|report| report.at)))?;
        let count = entry.last_report.map_or(0, |report| report.count).saturating_add(1);
        let trouble = trouble.clone();
        self.node.take(NODE, now);
        self.subjects.entry(trouble.subject.clone()).or_default().take(SUBJECT, now);
        Some((trouble, count))
    }

    /// Records the `count`th report of `trouble`, or that the server rejects it.
    pub(super) fn record(&mut self, trouble: &Trouble, count: i32, now: Instant) {
        if let Some(entry) = self.entries.get_mut(trouble) {
            entry.last_report = Some(Report { at: now, count, ended: false });
        }
    }
}

// === impl Entry ===

impl Entry {
    fn is_due(&self, subject: &Subject, since: Instant, now: Instant) -> bool {
        if !self.present || now.duration_since(since) < self.patience {
            return false;
        }
        let Some(report) = self.last_report else { return true };
        let pause = match subject {
            _ if self.once => return false,
            _ if report.ended => RETURN_INTERVAL,
            Subject::Pod { .. } => REPEAT_INTERVAL,
            // Every node with pods of the namespace reports it, and the pods' own Events are repeated.
            Subject::Namespace(_) => return false,
        };
        now.duration_since(report.at) >= pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn pod(n: u32, note: &str) -> PresentTrouble {
        let subject = Subject::Pod {
            namespace: "shop".to_owned(),
            name: format!("p{n:04}"),
            uid: n.to_string(),
        };
        let trouble = Trouble { subject, reason: "RoleForbidden", note: note.to_owned() };
        PresentTrouble { trouble, patience: Duration::ZERO, once: false }
    }

    fn reported(ledger: &mut Ledger, now: Instant) -> Vec<(String, i32)> {
        let mut all = Vec::new();
        while let Some((trouble, count)) = ledger.next(now) {
            ledger.record(&trouble, count, now);
            all.push((trouble.note, count));
        }
        all
    }

    #[test]
    fn what_lasts_is_told_of_once_and_then_every_half_hour() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let mut counts = Vec::new();
        for minute in 0..=95 {
            let now = start + MINUTE * minute;
            let news = ledger.take(vec![pod(1, "no")], now);
            assert_eq!(news.troubles.len(), usize::from(minute == 0));
            counts.extend(reported(&mut ledger, now).into_iter().map(|(_, count)| (minute, count)));
        }
        assert_eq!(counts, [(0, 1), (30, 2), (60, 3), (90, 4)]);
    }

    #[test]
    fn what_is_not_told_stays_due_and_what_passes_is_counted() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        ledger.take(vec![pod(1, "no")], now);
        assert!(ledger.next(now).is_some());
        assert!(ledger.next(now).is_some(), "the API server did not take it");
        assert_eq!(ledger.take(vec![], now).dropped, 1);
        assert!(ledger.next(now + MINUTE).is_none());
    }

    #[test]
    fn what_comes_back_is_told_of_again_but_not_at_once() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        ledger.take(vec![pod(1, "no")], start);
        assert_eq!(reported(&mut ledger, start).len(), 1);
        assert_eq!(ledger.take(vec![], start).dropped, 0);
        ledger.take(vec![pod(1, "no")], start + MINUTE);
        assert!(reported(&mut ledger, start + MINUTE).is_empty());
        assert_eq!(reported(&mut ledger, start + RETURN_INTERVAL), [("no".to_owned(), 2)]);
        ledger.take(vec![], start + RETURN_INTERVAL);
        ledger.take(vec![], start + RETURN_INTERVAL + RETENTION);
        assert!(ledger.entries.is_empty() && ledger.since.is_empty(), "{ledger:?}");
    }

    #[test]
    fn what_may_pass_is_told_of_when_it_lasts_whatever_its_words() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            let found = PresentTrouble { patience: MINUTE, ..pod(1, &format!("timeout {second}")) };
            assert_eq!(ledger.take(vec![found], now).dropped, 0);
            assert!(reported(&mut ledger, now).is_empty(), "{second}");
        }
        let found = PresentTrouble { patience: MINUTE, ..pod(1, "timeout") };
        ledger.take(vec![found], start + MINUTE);
        assert_eq!(reported(&mut ledger, start + MINUTE).len(), 1);
    }

    #[test]
    fn a_pod_that_changes_its_mind_costs_little_and_is_forgotten() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let (mut sent, mut dropped) = (0, 0);
        for second in 0..3600 {
            let now = start + Duration::from_secs(second);
            dropped += ledger.take(vec![pod(1, &second.to_string())], now).dropped;
            sent += reported(&mut ledger, now).len();
        }
        assert_eq!(sent, 3 + 11, "a few at once, then one in five minutes");
        assert_eq!(dropped, 3600 - 14 - 1);
        assert!(ledger.entries.len() < 20);
    }

    #[test]
    fn a_node_full_of_trouble_tells_of_it_all_in_time() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let found: Vec<PresentTrouble> = (0..100).map(|n| pod(n, &n.to_string())).collect();
        let mut sent = BTreeMap::new();
        for second in 0..1200 {
            let now = start + Duration::from_secs(second);
            ledger.take(found.clone(), now);
            let all = reported(&mut ledger, now);
            assert!(second == 0 || all.len() <= 1);
            sent.extend(all.into_iter().map(|(note, count)| (note, (second, count))));
        }
        assert_eq!(sent.len(), 100);
        assert_eq!(sent.values().map(|(second, _)| *second).max(), Some(900));
    }

    #[test]
    fn what_one_event_is_enough_for_waits_for_the_rest_and_is_not_repeated() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let found = vec![PresentTrouble { once: true, ..pod(1, "older") }, pod(2, "no")];
        let mut sent = Vec::new();
        for minute in 0..100 {
            let now = start + MINUTE * minute;
            // Not found for a while, as when an agent starts again.
            let found = if minute == 40 { Vec::new() } else { found.clone() };
            ledger.take(found, now);
            sent.extend(reported(&mut ledger, now).into_iter().map(|(note, _)| note));
        }
        assert_eq!(sent[..2], ["no", "older"]);
        assert_eq!(sent.iter().filter(|note| *note == "older").count(), 1);
    }

    #[test]
    fn a_namespace_is_told_of_once() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let found = || {
            let subject = Subject::Namespace("shop".to_owned());
            let trouble = Trouble { subject, reason: "InvalidPermitted", note: "no".to_owned() };
            vec![PresentTrouble { trouble, patience: Duration::ZERO, once: false }]
        };
        let mut sent = 0;
        for minute in 0..600 {
            let now = start + MINUTE * minute;
            assert_eq!(ledger.take(found(), now).troubles.len(), usize::from(minute == 0));
            sent += reported(&mut ledger, now).len();
        }
        assert_eq!(sent, 1);
    }
}
