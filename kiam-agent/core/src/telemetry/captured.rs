//! What a test's own thread logs.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tracing::subscriber::{DefaultGuard, set_default};

/// The lines so far, without colours; logged to while it lives.
pub struct CapturedLogs {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: DefaultGuard,
}

struct Writer(Arc<Mutex<Vec<u8>>>);

impl CapturedLogs {
    /// Captures from now on what this thread logs at `level` or above.
    pub fn start(level: tracing::Level) -> Self {
        let text: Arc<Mutex<Vec<u8>>> = Arc::default();
        let writer = text.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(level)
            .with_writer(move || Writer(writer.clone()))
            .finish();
        Self { text, _guard: set_default(subscriber) }
    }

    /// The lines that have `part`.
    ///
    /// # Panics
    ///
    /// Something that logged panicked, or logged what is no text.
    pub fn lines_with(&self, part: &str) -> Vec<String> {
        let text =
            String::from_utf8(self.text.lock().expect("no logger panics").clone()).expect("text");
        text.lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
    }
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no logger panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
