//! The API server's answers, reduced while they arrive.
//!
//! Memory does not grow with the length of an answer, and no answer occupies a thread of the runtime for long.

use std::{io, pin::Pin, time::Duration};

use futures::{AsyncBufRead, AsyncBufReadExt as _};
use memchr::memchr;
use tokio::{task::yield_now, time};

use super::{
    failure::Failure,
    sieve::{Filter, InvalidJson, Sieve},
};

/// The bytes that are processed before the task yields: a fraction of a millisecond's work.
const CHUNK: usize = 16 * 1024;

/// The longest pause in an answer that is not a watch.
pub(super) const IDLE: Duration = Duration::from_secs(30);

/// The body of an answer, which is reduced by a sieve.
pub(super) struct Body<R> {
    reader: R,
    sieve: Sieve,
}

/// A line of a watch, reduced, unless it is invalid JSON.
pub(super) type Line = Result<Vec<u8>, InvalidJson>;

// === impl Body ===

impl<R: AsyncBufRead> Body<Pin<Box<R>>> {
    /// The answer that `reader` reads, reduced by `filter`.
    pub(super) fn new(reader: R, filter: &'static Filter) -> Self {
        Self { reader: Box::pin(reader), sieve: Sieve::new(filter) }
    }
}

impl<R: AsyncBufRead + Unpin> Body<R> {
    /// Reads the body as one document, and calls `item` with each of its items.
    pub(super) async fn document(
        mut self,
        mut item: impl FnMut(&[u8]),
    ) -> Result<Vec<u8>, Failure> {
        loop {
            let next = time::timeout(IDLE, self.reader.fill_buf()).await;
            let bytes = next.map_err(|_| Failure::Timeout(IDLE))?.map_err(unreadable)?;
            if bytes.is_empty() {
                return Ok(self.sieve.finish()?.unwrap_or_default());
            }
            let chunk = bytes.len().min(CHUNK);
            self.sieve.feed(&bytes[..chunk], &mut item);
            self.reader.consume_unpin(chunk);
            yield_now().await;
        }
    }

    /// Reads the next line that is not blank. `None` at the end; an incomplete last line is dropped.
    pub(super) async fn line(&mut self) -> Result<Option<Line>, Failure> {
        loop {
            yield_now().await;
            let bytes = match self.reader.fill_buf().await {
                Ok(bytes) => bytes,
                Err(error) if is_an_end(&error) => return Ok(None),
                Err(error) => return Err(unreadable(error)),
            };
            if bytes.is_empty() {
                return Ok(None);
            }
            let chunk = &bytes[..bytes.len().min(CHUNK)];
            let end = memchr(b'\n', chunk);
            let taken = end.map_or(chunk.len(), |end| end + 1);
            self.sieve.feed(&chunk[..taken], |_| {});
            self.reader.consume_unpin(taken);
            if end.is_some()
                && let Some(line) = self.sieve.finish().transpose()
            {
                return Ok(Some(line));
            }
        }
    }
}

fn unreadable(error: io::Error) -> Failure {
    Failure::Request(kube::Error::ReadEvents(error))
}

/// Whether the server closed the connection in the middle of the answer, as many do with watches after some minutes.
fn is_an_end(error: &io::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|it| it as _);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|it| it.kind() == io::ErrorKind::UnexpectedEof)
            || error.to_string().contains("unexpected EOF during chunk")
        {
            return true;
        }
        cause = error.source();
    }
    false
}
