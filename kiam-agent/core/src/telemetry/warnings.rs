//! The last warnings and errors that were logged, for operators who look at a node's agent and not at its log.
//!
//! Equal warnings, which one place of the source logs, are one entry. So a pod that makes the agent warn all the time
//! displaces nothing but its own.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tracing::{
    Event, Level, Subscriber,
    callsite::Identifier,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

use super::words::plain_char;
use crate::{clock::Clock, role::QuotedText};

/// The most characters of a warning with its fields.
const MAX_TEXT: usize = 300;

/// The last warning of each kind. Cheap to clone. The source has so many kinds that they need no other bound.
#[derive(Clone, Debug, Default)]
pub struct Warnings(Arc<Mutex<HashMap<Identifier, Warning>>>);

/// Equal warnings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Whether it is an error.
    pub is_error: bool,
    /// The last one's text and fields, in printable ASCII and short.
    pub text: String,
    /// How many there were.
    pub count: u64,
    /// When the last one was logged.
    pub last: SystemTime,
}

/// An event's message and its fields, as they come.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

// === impl Warnings ===

impl Warnings {
    /// The last `most` kinds of warnings, the latest first.
    #[must_use]
    pub fn latest(&self, most: usize) -> Vec<Warning> {
        let mut all: Vec<_> = self.entries().values().cloned().collect();
        all.sort_by(|a, b| (b.last, &a.text).cmp(&(a.last, &b.text)));
        all.truncate(most);
        all
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Identifier, Warning>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        // Formatted before the lock is taken.
        let (text, last) = (line.text(), Clock::system().now());
        let mut entries = self.entries();
        let entry = entries.entry(metadata.callsite()).or_insert_with(|| Warning {
            is_error: *metadata.level() == Level::ERROR,
            text: String::new(),
            count: 0,
            last,
        });
        (entry.text, entry.last) = (text, last);
        entry.count += 1;
    }
}

// === impl Line ===

impl Line {
    fn text(self) -> String {
        let Self { message, fields } = self;
        let whole = if fields.is_empty() { message } else { format!("{message}:{fields}") };
        whole.chars().take(MAX_TEXT).map(plain_char).collect()
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to memory does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            name => self.fields += &format!(" {name}={}", QuotedText::new(value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tracing::{error, info, subscriber::with_default, warn};
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn equal_warnings_are_one_entry_and_a_flood_displaces_nothing() {
        let warnings = Warnings::default();
        let subscriber = tracing_subscriber::registry().with(warnings.clone());
        with_default(subscriber, || {
            error!(role = %"reader", "A role is denied");
            for n in 0..10_000 {
                warn!(path = format!("/\u{1b}[2J{n}{}", "x".repeat(5000)), "Rejected request");
            }
            warn!(took = ?Duration::from_nanos(1_500), "Slow \u{e9}");
            info!("An ordinary day");
        });
        let latest = warnings.latest(8);
        assert_eq!(latest.len(), 3, "{latest:?}");
        assert!(latest.iter().any(|it| it.text == "Slow ?: took=1.5us"), "{latest:?}");
        let rejected = latest.iter().find(|it| it.count > 1).unwrap();
        assert_eq!(rejected.count, 10_000);
        assert!(
            rejected.text.starts_with("Rejected request: path=\"/\\u{1b}[2J9999x"),
            "{rejected:?}"
        );
        assert!(rejected.text.len() <= MAX_TEXT, "{rejected:?}");
        let denied = latest.iter().find(|it| it.is_error).unwrap();
        assert_eq!((denied.text.as_str(), denied.count), ("A role is denied: role=reader", 1));
        assert_eq!(warnings.latest(1).len(), 1);
    }
}
