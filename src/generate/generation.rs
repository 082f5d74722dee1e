//! A generation in flight, as its caller sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvError;
#[cfg(feature = "futures")]
use std::task::{Context, Poll};

use super::completion::{Completion, Piece};
use super::events::EventReceiver;
use super::job::Event;
#[cfg(feature = "futures")]
use super::stream::GenerationStream;
use super::worker::{Ending, gone};
use crate::{Error, Result};

/// A generation in flight: iterate over its pieces as they come, then [`finish`](Generation::finish) for the whole.
///
/// It runs whether or not anybody reads; dropping it cancels it. An error is the last item of the iterator.
pub struct Generation {
    events: EventReceiver,
    ending: Ending,
    cancelled: Arc<AtomicBool>,
    result: Option<Result<Completion>>,
}

/// Cancels a generation from anywhere, such as a signal handler's thread.
#[derive(Clone, Debug)]
pub struct Canceller(Arc<AtomicBool>);

impl Canceller {
    /// The generation ends with what it has, as [`FinishReason::Cancelled`](crate::FinishReason::Cancelled), unless it
    /// has ended already.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Generation {
    pub(crate) fn new(events: EventReceiver, ending: Ending) -> Self {
        Generation { events, ending, cancelled: Arc::default(), result: None }
    }

    pub(crate) fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancelled.clone()
    }

    /// For another thread to end this generation with.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.cancelled.clone())
    }

    /// Same as [`Canceller::cancel`].
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// Waits for the end and returns everything, pieces already read included.
    ///
    /// # Errors
    /// [`Error::Engine`] if the engine failed under this request, [`Error::Tokenizer`] if its tokens have no text.
    pub fn finish(mut self) -> Result<Completion> {
        while self.next().is_some() {}
        self.result.take().unwrap_or_else(|| Err(gone(&self.ending)))
    }

    /// The same for programs that do not block.
    #[cfg(feature = "futures")]
    pub fn into_stream(self) -> GenerationStream {
        GenerationStream::new(self)
    }

    #[cfg(feature = "futures")]
    pub(crate) fn poll_next(&mut self, context: &Context<'_>) -> Poll<Option<Result<Piece>>> {
        if self.has_ended() {
            return Poll::Ready(None);
        }
        self.events.poll(context).map(|event| self.take(event))
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.result.is_some()
    }

    fn take(&mut self, event: Result<Event, RecvError>) -> Option<Result<Piece>> {
        match event {
            Ok(Event::Piece(piece)) => Some(Ok(piece)),
            Ok(Event::Done(completion)) => {
                self.result = Some(Ok(*completion));
                None
            }
            Ok(Event::Failed(error)) => self.end(error),
            Err(RecvError) => self.end(gone(&self.ending)),
        }
    }

    fn end(&mut self, error: Error) -> Option<Result<Piece>> {
        self.result = Some(Err(error.duplicate()));
        Some(Err(error))
    }
}

impl Iterator for Generation {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        if self.has_ended() {
            return None;
        }
        let event = self.events.recv();
        self.take(event)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancel();
    }
}
