//! What was made of a text, so that it is made once and not at every decision.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// How many texts are remembered; namespaces mostly share a few.
const TEXTS: usize = 256;

/// How long they are in all, in bytes: whoever annotates namespaces must not fill the agent's memory.
const BYTES: usize = 1024 * 1024;

/// A longer text is not remembered; what is made of texts refuses such a one without reading it.
pub(super) const LONGEST: usize = 64 * 1024;

/// Remembers what was made of each text, mistakes included.
#[derive(Debug)]
pub(super) struct Kept<T>(Mutex<Made<T>>);

#[derive(Debug)]
struct Made<T> {
    of: HashMap<String, T>,
    /// The texts' length.
    bytes: usize,
}

// === impl Kept ===

impl<T: Clone> Kept<T> {
    /// What `make` makes of `text`, or made of it before.
    pub(super) fn get(&self, text: &str, make: impl FnOnce() -> T) -> T {
        if text.len() > LONGEST {
            return make();
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept.of.get(text) {
            return known.clone();
        }
        if kept.of.len() >= TEXTS || kept.bytes + text.len() > BYTES {
            kept.of.clear();
            kept.bytes = 0;
        }
        let made = make();
        kept.of.insert(text.to_owned(), made.clone());
        kept.bytes += text.len();
        made
    }
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::new(Made { of: HashMap::new(), bytes: 0 }))
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
            assert!(kept.0.lock().unwrap().of.len() <= TEXTS);
        }
        for n in 0..100 {
            kept.get(&format!("{n:02}{}", "x".repeat(LONGEST - 2)), || 0);
            let made = kept.0.lock().unwrap();
            let bytes: usize = made.of.keys().map(String::len).sum();
            assert!(bytes <= BYTES && bytes == made.bytes, "{bytes} {}", made.bytes);
        }
        let longer = "x".repeat(LONGEST + 1);
        assert_eq!((kept.get(&longer, || 1), kept.get(&longer, || 2)), (1, 2));
    }
}
