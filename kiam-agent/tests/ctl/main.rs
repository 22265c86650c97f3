//! `kubectl kiam` from a laptop: the real program, an API server that runs commands by real websockets, and the real agents in
//! whose containers they run. What is broken is named.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy knows no test helpers outside #[test] functions"
)]

mod nodes;
mod output;
mod pods;
mod stage;
