//! Structured logs: lines for people, or JSON with kiam's field names for machines.

use std::{
    fmt,
    io::{self, IsTerminal as _},
    str::FromStr,
};

use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

use super::Warnings;

/// The log level, by kiam's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Also the libraries' messages.
    Trace,
    /// The story of each request.
    Debug,
    /// The story of a day.
    Info,
    /// Someone may have to act.
    Warn,
    /// Something is broken.
    Error,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line, the fields at its top level.
    Json,
}

/// The configuration of logging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logs {
    /// `--level`.
    pub level: Level,
    /// `--json-log`.
    pub format: Format,
}

/// A handle that changes the level while the agent runs, and has the last warnings.
#[derive(Clone, Debug)]
pub struct LogLevel {
    filter: reload::Handle<Targets, tracing_subscriber::Registry>,
    warnings: Warnings,
}

/// Text that is not a level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no log level: use trace, debug, info, warn or error")]
pub struct InvalidLevel(String);

// === impl Logs ===

impl Logs {
    /// Starts logging to standard error. A process can do so once.
    ///
    /// # Errors
    ///
    /// If the process logs already.
    pub fn init(self) -> Result<LogLevel, tracing_subscriber::util::TryInitError> {
        let (filter, handle) = reload::Layer::new(self.level.filter());
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal());
        let warnings = Warnings::default();
        let registry = tracing_subscriber::registry().with(filter).with(warnings.clone());
        match self.format {
            Format::Text => registry.with(lines.with_target(false)).try_init()?,
            Format::Json => {
                let json = lines.json().flatten_event(true).with_current_span(false);
                registry.with(json.with_span_list(false)).try_init()?;
            }
        }
        Ok(LogLevel { filter: handle, warnings })
    }
}

// === impl LogLevel ===

impl LogLevel {
    /// Sets the level.
    pub fn set(&self, level: Level) {
        self.filter.reload(level.filter()).expect("the subscriber lives as long as the process");
    }

    /// The last warnings that were logged.
    #[must_use]
    pub fn warnings(&self) -> Warnings {
        self.warnings.clone()
    }

    /// The filter in force, as `tracing` writes it.
    #[must_use]
    pub fn get(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }
}

// === impl Level ===

impl Level {
    /// The filter of this level. Libraries log only warnings, or more at `trace`. kube's client logs every failed request
    /// as an error; `cluster` logs each outage once.
    fn filter(self) -> Targets {
        // A prefix that matches all crates of the agent.
        let agent = Targets::new().with_target("kiam", LevelFilter::from(self));
        if self == Self::Trace {
            return agent.with_default(LevelFilter::DEBUG);
        }
        agent.with_default(LevelFilter::WARN).with_target("kube_client", LevelFilter::OFF)
    }
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Trace => Self::TRACE,
            Level::Debug => Self::DEBUG,
            Level::Info => Self::INFO,
            Level::Warn => Self::WARN,
            Level::Error => Self::ERROR,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        })
    }
}

impl FromStr for Level {
    type Err = InvalidLevel;

    /// Also takes logrus's `warning`, `fatal` and `panic`, which kiam's manifests may have.
    fn from_str(text: &str) -> Result<Self, InvalidLevel> {
        match text.to_ascii_lowercase().as_str() {
            "trace" => Ok(Self::Trace),
            "debug" => Ok(Self::Debug),
            "info" => Ok(Self::Info),
            "warn" | "warning" => Ok(Self::Warn),
            "error" | "fatal" | "panic" => Ok(Self::Error),
            _ => Err(InvalidLevel(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_parse_by_kiams_names_and_others_say_what_to_use() {
        assert_eq!("INFO".parse(), Ok(Level::Info));
        assert_eq!("warning".parse(), Ok(Level::Warn));
        let error = "verbose".parse::<Level>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"verbose\" is no log level: use trace, debug, info, warn or error"
        );
    }

    #[test]
    fn libraries_are_quiet_below_trace() {
        let debug = Level::Debug.filter().to_string();
        let mut directives: Vec<&str> = debug.split(',').collect();
        directives.sort_unstable();
        assert_eq!(directives, ["kiam=debug", "kube_client=off", "warn"]);
        assert_eq!(Level::Trace.filter().to_string(), "kiam=trace,debug");
    }
}
