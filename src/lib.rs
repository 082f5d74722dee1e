//! Gemma 1, 2 and 3 text generation over an embeddable C++ core.
//!
//! [`Gemma`] loads a Hugging Face checkpoint and answers [`Request`]s from any number of threads; they share one
//! running batch (ragged, nothing is padded) and one paged KV cache:
//!
//! ```no_run
//! use gemma_cuda::{Gemma, LoadOptions, Request};
//!
//! # fn main() -> gemma_cuda::Result<()> {
//! let gemma = Gemma::load("models/gemma-3-270m", LoadOptions::default())?;
//! for piece in gemma.generate(Request::new("The capital of France is").max_new_tokens(48))? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Gemma`] and [`Canceller`] are `Send` and `Sync` and cheap to clone, a [`Generation`] is `Send`; an
//! [`Engine`](engine::Engine) is `Send`, for one thread at a time. Everything else is plain data.
//!
//! Below it lie [`engine`], the step function for those who schedule on their own, and [`checkpoint`], which reads
//! configs, tensors, tokenizers and chat templates. [`verify`](mod@verify) holds an engine against golden values of
//! another implementation, [`eval`](mod@eval) measures perplexity, [`calibrate`] makes FP8 checkpoints.
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod bridge;
pub mod calibrate;
pub mod checkpoint;
pub mod engine;
mod error;
pub mod eval;
pub mod generate;
mod load;
mod model;
mod options;
mod parallel;
pub mod verify;

pub use error::{Error, Result};
#[cfg(feature = "futures")]
pub use generate::GenerationStream;
pub use generate::{
    Canceller, Completion, FinishReason, Generation, Piece, Prompt, Request, SamplingParams, Timing, Token, TopToken,
    Usage,
};
pub use load::LoadProgress;
pub use model::Gemma;
pub use options::{ComputeType, KvCache, LoadOptions};

/// What the documentation says of threads.
const _: () = {
    const fn sent<T: Send>() {}
    const fn shared<T: Send + Sync>() {}
    shared::<Gemma>();
    shared::<Canceller>();
    shared::<Request>();
    shared::<Completion>();
    shared::<Error>();
    sent::<Generation>();
    sent::<engine::Engine>();
    #[cfg(feature = "futures")]
    sent::<GenerationStream>();
};

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
