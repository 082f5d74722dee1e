//! FP8: what a model's activations look like on real text, the scales that follow from it, and checkpoints with them.
//!
//! [`gather`] runs the model over sequences, with the very forward pass that generates, and counts the magnitudes of
//! every matrix's inputs and of each K/V head's keys and values: the largest over all tokens, and how many there are of
//! which size. [`write_checkpoint`] makes an FP8 checkpoint of that, in the form of compressed-tensors, which this crate
//! and transformers load.

mod gather;
mod scales;
mod statistics;
mod text;
mod write;

pub use gather::gather;
pub use scales::Method;
pub use statistics::{Magnitudes, Statistics};
pub use text::{TextFormat, sequences};
pub use write::{CacheType, Recipe, RecipeKind, write_checkpoint};
