#![deny(unsafe_code)]
mod bridge;
pub mod checkpoint;
pub mod engine;
mod error;
pub mod eval;
pub mod generate;
mod load;
mod memory;
mod model;
mod options;
pub mod verify;

pub use error::{Error, Result};
pub use generate::{
    Canceller, Completion, FinishReason, Generation, Piece, Prompt, Request, SamplingParams, Timing, Token, TopToken,
    Usage,
};
pub use load::LoadProgress;
pub use model::Gemma;
pub use options::{ComputeType, KvCache, LoadOptions};
