//! How many pods the agent knows, and what becomes of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::account::Account;
use kiam_core::policy::Decision;

/// The node's pods that have not ended, by what becomes of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodCounts {
    /// All of them.
    pub known: usize,
    /// Those that are answered with credentials of their role.
    pub served: usize,
    /// Those that are allowed a role, and have no credentials.
    pub unserved: usize,
    /// Those that name a role which they may not have.
    pub refused: usize,
    /// By the path of their connections.
    pub by_path: BTreeMap<String, usize>,
}

// === impl PodCounts ===

impl PodCounts {
    pub(super) fn add(&mut self, account: &Account<'_>) {
        if !account.pod.live {
            return;
        }
        self.known += 1;
        let path = account.path_name().to_owned();
        *self.by_path.entry(path).or_default() += 1;
        let names_role = account.role.is_some();
        match &account.decision {
            Decision::Allow(_) if account.answer().is_ok() => self.served += 1,
            Decision::Allow(_) => self.unserved += 1,
            Decision::Refuse(_) => self.refused += usize::from(names_role),
        }
    }

    /// All of it in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { known, served, unserved, refused, by_path } = self;
        let mut line = format!("{known} known, {served} served");
        for (count, what) in [(unserved, "without credentials"), (refused, "refused")] {
            if *count > 0 {
                line += &format!(", {count} {what}");
            }
        }
        let paths: Vec<String> =
            by_path.iter().map(|(path, count)| format!("{path} {count}")).collect();
        if !paths.is_empty() {
            line += &format!("; by path: {}", paths.join(", "));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_none_is_left_out() {
        let by_path = [("node", 2), ("pod-local", 40)].map(|(path, n)| (path.to_owned(), n));
        let mut counts = PodCounts { known: 42, served: 7, ..PodCounts::default() };
        assert_eq!(counts.line(), "42 known, 7 served");
        (counts.refused, counts.by_path) = (1, by_path.into());
        assert_eq!(counts.line(), "42 known, 7 served, 1 refused; by path: node 2, pod-local 40");
    }
}
