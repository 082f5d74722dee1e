//! Generation: requests in, pieces of text out.
//!
//! A [`Request`] says what to continue, how to sample and when to stop. One worker thread owns the engine and batches
//! all requests continuously; each comes back as a [`Generation`], and its tokens do not depend on what else runs.

mod completion;
mod events;
#[cfg(test)]
mod fake;
mod generation;
mod job;
mod request;
mod sampling;
mod scheduler;
mod stop;
#[cfg(feature = "futures")]
mod stream;
mod text;
mod worker;

pub use completion::{Completion, FinishReason, Piece, Timing, Token, TopToken};
pub use generation::{Canceller, Generation};
pub use request::{DEFAULT_MAX_NEW_TOKENS, MAX_LOGPROBS, Prompt, Request};
pub use sampling::SamplingParams;
pub use scheduler::Usage;
#[cfg(feature = "futures")]
pub use stream::GenerationStream;

pub(crate) use job::Plan;
pub(crate) use scheduler::{Core, Limits, Scheduler};
pub(crate) use text::TextStream;
pub(crate) use worker::Worker;
