//! What was made of a text, so that it is made once and not at every decision.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// How many texts are remembered; namespaces mostly share a few.
const TEXTS: usize = 256;

/// Remembers what was made of each text, mistakes included.
#[derive(Debug)]
pub(super) struct Kept<T>(Mutex<HashMap<String, T>>);

// === impl Kept ===

impl<T: Clone> Kept<T> {
    /// What `make` makes of `text`, or made of it before.
    pub(super) fn get(&self, text: &str, make: impl FnOnce() -> T) -> T {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept.get(text) {
            return known.clone();
        }
        if kept.len() >= TEXTS {
            kept.clear();
        }
        let made = make();
        kept.insert(text.to_owned(), made.clone());
        made
    }
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_text_is_made_once_and_memory_is_bounded() {
        let kept = Kept::default();
        assert_eq!((kept.get("a", || 1), kept.get("a", || 2), kept.get("b", || 3)), (1, 1, 3));
        for n in 0..10 * TEXTS {
            kept.get(&n.to_string(), || 0);
        }
        assert!(kept.0.lock().unwrap().len() <= TEXTS);
    }
}
