//! A generation for programs that do not block: a `Stream`, whatever runs it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use futures_core::stream::FusedStream;

use super::completion::{Completion, Piece};
use super::generation::{Canceller, Generation};
use crate::Result;

/// A generation in flight as a [`Stream`] of its pieces; of [`Generation::into_stream`]. No runtime is needed: the model's
/// own thread wakes whoever polls. An error is the last item. Dropping it cancels the generation.
///
/// ```no_run
/// # async fn example(gemma: gemma_cuda::Gemma) -> gemma_cuda::Result<()> {
/// use std::future::poll_fn;
/// use std::pin::Pin;
///
/// use futures_core::Stream; // or futures::StreamExt, and `while let Some(piece) = pieces.next().await`
///
/// let mut pieces = gemma.generate(gemma_cuda::Request::new("Once upon a time"))?.into_stream();
/// while let Some(piece) = poll_fn(|context| Pin::new(&mut pieces).poll_next(context)).await {
///     print!("{}", piece?.text);
/// }
/// let completion = pieces.finish().await?;
/// # Ok(())
/// # }
/// ```
pub struct GenerationStream(Generation);

impl GenerationStream {
    pub(crate) fn new(generation: Generation) -> Self {
        GenerationStream(generation)
    }

    /// For another thread or task to end this generation with.
    pub fn canceller(&self) -> Canceller {
        self.0.canceller()
    }

    /// Waits for the end and returns everything, pieces already read included.
    ///
    /// # Errors
    /// Those of [`Generation::finish`].
    pub async fn finish(mut self) -> Result<Completion> {
        while poll_fn(|context| Pin::new(&mut self).poll_next(context)).await.is_some() {}
        self.0.finish()
    }
}

impl Stream for GenerationStream {
    type Item = Result<Piece>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next(context)
    }
}

impl FusedStream for GenerationStream {
    fn is_terminated(&self) -> bool {
        self.0.has_ended()
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Wake, Waker};
    use std::thread::Thread;

    use super::*;
    use crate::{Error, Gemma, LoadOptions, Request};

    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    /// All the runtime there is.
    fn block_on<F: Future>(future: F) -> F::Output {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut future = pin!(future);
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(output) => return output,
                Poll::Pending => std::thread::park(),
            }
        }
    }

    fn gemma() -> Gemma {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny/gemma2-gqa");
        Gemma::load(dir, LoadOptions { device: "reference".into(), threads: 1, ..Default::default() }).unwrap()
    }

    fn request(new: usize) -> Request {
        Request::new(vec![2, 5, 9]).max_new_tokens(new).ignore_eos(true)
    }

    #[test]
    fn pieces_and_the_whole_are_those_of_a_blocking_reader() {
        let gemma = gemma();
        let want = gemma.generate(request(40)).and_then(Generation::finish).unwrap();
        block_on(async {
            // Two at once, polled in turn.
            let mut streams = [0, 1].map(|_| gemma.generate(request(40)).unwrap().into_stream());
            let mut ids = [Vec::new(), Vec::new()];
            while streams.iter().any(|stream| !stream.is_terminated()) {
                for (stream, ids) in streams.iter_mut().zip(&mut ids) {
                    if let Some(piece) = poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await {
                        ids.extend(piece.unwrap().tokens.iter().map(|token| token.id));
                    }
                }
            }
            for (stream, ids) in streams.into_iter().zip(ids) {
                assert_eq!(ids, want.token_ids);
                assert_eq!(stream.finish().await.unwrap().token_ids, want.token_ids);
            }
        });
    }

    #[test]
    fn an_end_in_between_wakes_the_reader() {
        let gemma = gemma();
        let stream = gemma.generate(request(120)).unwrap().into_stream();
        let canceller = stream.canceller();
        let cancel = std::thread::spawn(move || canceller.cancel());
        assert!(block_on(stream.finish()).unwrap().token_ids.len() <= 120);
        cancel.join().unwrap();

        let stream = gemma.generate(request(120)).unwrap().into_stream();
        drop(gemma); // ends every request as cancelled
        assert!(block_on(stream.finish()).is_ok());

        let (sender, receiver) = crate::generate::events::events();
        let ending = crate::generate::worker::Ending::default();
        ending.get_or_init(|| "it ended".into());
        let stream = Generation::new(receiver, ending).into_stream();
        std::thread::spawn(move || drop(sender));
        assert!(matches!(block_on(stream.finish()), Err(Error::Engine(message)) if message == "it ended"));
    }
}
