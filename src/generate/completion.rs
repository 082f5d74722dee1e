//! What a caller gets back.

use std::time::Duration;

use serde::{Serialize, Serializer};

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token was generated.
    Stop,
    /// A stop string was completed.
    StopString,
    /// `max_new_tokens` were generated.
    Length,
    /// The caller cancelled, or the last handle to the model was dropped.
    Cancelled,
}

/// A token and how likely the model took it to be.
///
/// Log-probabilities are natural logarithms under the model itself, before bias, penalties and temperature.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Token {
    /// Of the vocabulary.
    pub id: u32,
    /// In nats, under the model: before bias, penalties and temperature.
    pub logprob: f32,
    /// The likeliest tokens at this position, best first; as many as the request asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TopToken>,
}

/// One of the likeliest tokens at a position.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TopToken {
    /// Of the vocabulary.
    pub id: u32,
    /// In nats.
    pub logprob: f32,
}

/// What one step added to a generation. The texts of all pieces make up [`Completion::text`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Text that is now certain. Empty while a character is incomplete or a stop string may be beginning, and always
    /// without a tokenizer.
    pub text: String,
    /// The tokens of this step: one, or none in a last piece that only releases text held back.
    pub tokens: Vec<Token>,
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Completion {
    /// The generated text, without stop token or stop string. Empty without a tokenizer.
    pub text: String,
    /// Every generated token, a final stop token and those of a stop string included.
    pub token_ids: Vec<u32>,
    /// The prompt as the model saw it.
    pub prompt_token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry for each of `token_ids`, if the request asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<Token>>,
    /// One entry for each prompt token but the first, if the request asked for it. Shorter if it was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Token>>,
    /// What repeats this generation, given or drawn; `None` if it was greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Prompt tokens whose keys and values an earlier request had left in the cache.
    pub cached_prompt_tokens: usize,
    /// How long it took.
    pub timing: Timing,
}

/// How long a generation took, counted from its submission. Serialized in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Timing {
    /// Until it entered the batch.
    #[serde(serialize_with = "seconds")]
    pub queued: Duration,
    /// Until its first token; `None` if it ended without one.
    #[serde(serialize_with = "optional_seconds")]
    pub first_token: Option<Duration>,
    /// From submission to the end.
    #[serde(serialize_with = "seconds")]
    pub total: Duration,
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

fn optional_seconds<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
}
