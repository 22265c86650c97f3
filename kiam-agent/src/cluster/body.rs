//! Answers of the API server, reduced as they come in.
//!
//! What an answer costs in memory does not depend on how long it is, nor does it keep a thread of the runtime for long.

use std::{io, pin::Pin, time::Duration};

use futures::{AsyncBufRead, AsyncBufReadExt as _};
use memchr::memchr;
use tokio::{task::yield_now, time};

use super::{
    failure::Failure,
    sieve::{Filter, InvalidJson, Sieve},
};

/// How much is looked at before others have their turn: a fraction of a millisecond's work.
const BITE: usize = 16 * 1024;

/// How long the server may take to go on with an answer that is not a watch.
pub(super) const IDLE: Duration = Duration::from_secs(30);

/// The body of an answer.
pub(super) struct Body<R> {
    reader: R,
    sieve: Sieve,
}

/// A watch's next line, reduced; it may be no JSON.
pub(super) type Line = Result<Vec<u8>, InvalidJson>;

// === impl Body ===

impl<R: AsyncBufRead> Body<Pin<Box<R>>> {
    /// What is kept of the answer that `reader` reads.
    pub(super) fn new(reader: R, keep: &'static Filter) -> Self {
        Self { reader: Box::pin(reader), sieve: Sieve::new(keep) }
    }
}

impl<R: AsyncBufRead + Unpin> Body<R> {
    /// Reads it as one document, and calls `item` with each of the items in it.
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
            let bite = bytes.len().min(BITE);
            self.sieve.feed(&bytes[..bite], &mut item);
            self.reader.consume_unpin(bite);
            yield_now().await;
        }
    }

    /// Reads the next line that is not blank; `None` at the end, whatever comes before it without an end of its line.
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
            let bite = &bytes[..bytes.len().min(BITE)];
            let end = memchr(b'\n', bite);
            let taken = end.map_or(bite.len(), |end| end + 1);
            self.sieve.feed(&bite[..taken], |_| {});
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

/// Whether the server ended the answer without saying so, as many do with watches after some minutes.
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
