//! The log lines of a test's own thread.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tracing::subscriber::{DefaultGuard, set_default};

/// The captured lines, without colours. Capturing ends when it is dropped.
pub struct CapturedLogs {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: DefaultGuard,
}

struct Writer(Arc<Mutex<Vec<u8>>>);

impl CapturedLogs {
    /// Starts to capture the lines of this thread at `level` or above.
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

    /// The lines that contain `part`.
    ///
    /// # Panics
    ///
    /// If a logging thread panicked, or logged bytes that are not text.
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
