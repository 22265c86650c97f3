//! The objects that changed lately, so that whoever follows the table looks only at those.

use std::collections::VecDeque;

use super::PodUid;
use crate::role::AccountName;

/// The most changes that are kept. Who has missed more looks at all objects: that takes milliseconds, and happens after a
/// list that shows many differences.
const KEPT: usize = 1024;

/// An object that has changed, or is new or gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// A pod.
    Pod(PodUid),
    /// A namespace.
    Namespace(String),
    /// A ServiceAccount.
    Account(AccountName),
}

/// A place in the log of changes: what came before is known to the one who holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position(Option<u64>);

/// The latest changes, the oldest first.
#[derive(Debug, Default)]
pub(super) struct ChangeLog {
    /// The number of changes that are no longer kept.
    dropped: u64,
    kept: VecDeque<Changed>,
}

// === impl ChangeLog ===

impl ChangeLog {
    pub(super) fn push(&mut self, changed: Changed) {
        if self.kept.len() >= KEPT {
            self.kept.pop_front();
            self.dropped += 1;
        }
        self.kept.push_back(changed);
    }

    /// The changes since `position`, which moves to the end; `None` if anything may have changed since.
    pub(super) fn since(&self, position: &mut Position) -> Option<Vec<Changed>> {
        let end = self.dropped + self.kept.len() as u64;
        let known = position.0.replace(end)?;
        let first = usize::try_from(known.checked_sub(self.dropped)?).ok()?;
        Some(self.kept.range(first..).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_given_once_and_all_may_have_changed_where_some_are_no_longer_kept() {
        let change = |n: usize| Changed::Namespace(n.to_string());
        let (mut log, mut position) = (ChangeLog::default(), Position::default());
        log.push(change(0));
        assert_eq!(log.since(&mut position), None, "it has seen nothing so far");
        assert_eq!(log.since(&mut position), Some(vec![]));
        log.push(change(1));
        log.push(change(2));
        assert_eq!(log.since(&mut position), Some(vec![change(1), change(2)]));
        let late = position;
        for n in 0..KEPT {
            log.push(change(n));
        }
        assert_eq!(log.since(&mut position).map(|changes| changes.len()), Some(KEPT));
        log.push(change(3));
        assert_eq!(log.since(&mut position), Some(vec![change(3)]));
        let mut late = late;
        assert_eq!(log.since(&mut late), None);
        assert_eq!(late, position);
        assert_eq!(log.kept.len(), KEPT);
    }
}
