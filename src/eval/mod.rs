//! Perplexity: how well a model predicts a text; and how far a quantized one is from the one it was made of.

mod compare;

use std::collections::VecDeque;
use std::time::Instant;

use serde::Serialize;

pub use compare::{Quality, compare};

use crate::{Error, Gemma, Generation, Prompt, Result};

/// Tokens of a window that does not say otherwise, where the model's context allows so many.
pub const DEFAULT_WINDOW: usize = 2048;

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens of the text; each was predicted once.
    pub tokens: usize,
    /// How many the text was cut into.
    pub windows: usize,
    /// Tokens in a full window, the beginning-of-sequence token included.
    pub window: usize,
    /// Sum of the negative log-likelihoods of all tokens, in nats.
    pub nll: f64,
    /// `exp(nll / tokens)`.
    pub perplexity: f64,
    /// Without loading.
    pub seconds: f64,
    /// Predicted tokens.
    pub tokens_per_second: f64,
}

/// Measures the perplexity of `text`, telling after each window how many tokens of how many are done.
///
/// The text is cut into consecutive windows that do not overlap. Each starts anew with the beginning-of-sequence token,
/// which itself is not counted, so every token of the text is predicted exactly once, from what precedes it in its
/// window. `window` is the length of a window with that token: 2 up to [`Gemma::context`], by default
/// [`DEFAULT_WINDOW`] or the context if that is smaller.
///
/// # Errors
/// [`Error::InvalidArgument`] for an empty text or a window out of range, [`Error::Tokenizer`] without a tokenizer, and
/// the errors of [`Gemma::score`].
pub fn perplexity(
    model: &Gemma,
    text: &str,
    window: Option<usize>,
    progress: impl FnMut(usize, usize),
) -> Result<Perplexity> {
    let mut tokens = model.tokenize(&Prompt::Text(text.to_owned()))?;
    let bos = model.bos_token().ok_or_else(|| {
        Error::Tokenizer("the checkpoint names no beginning-of-sequence token, with which each window starts".into())
    })?;
    if tokens.first() == Some(&bos) {
        tokens.remove(0);
    }
    perplexity_of_tokens(model, bos, &tokens, window, progress)
}

/// The same for tokens, which do not begin with `bos`.
pub fn perplexity_of_tokens(
    model: &Gemma,
    bos: u32,
    tokens: &[u32],
    window: Option<usize>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Perplexity> {
    let context = model.context();
    let window = window.unwrap_or(DEFAULT_WINDOW.min(context));
    if !(2..=context).contains(&window) {
        return Err(Error::InvalidArgument(format!(
            "the window is {window} tokens; it must be between 2 and {context}, which the context and the KV cache hold"
        )));
    }
    if tokens.is_empty() {
        return Err(Error::InvalidArgument("the text is empty; there is nothing to predict".into()));
    }
    let start = Instant::now();
    let (mut nll, mut done, mut windows) = (0.0, 0, 0);
    let mut collect = |generation: Generation| -> Result<()> {
        let scored = generation.finish()?.prompt_logprobs.unwrap_or_default();
        nll -= scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>();
        done += scored.len();
        windows += 1;
        progress(done, tokens.len());
        Ok(())
    };
    // Two windows in flight keep the engine busy while a finished one is collected.
    let mut running = VecDeque::new();
    for chunk in tokens.chunks(window - 1) {
        let sequence: Vec<u32> = std::iter::once(bos).chain(chunk.iter().copied()).collect();
        running.push_back(model.start_scoring(&sequence)?);
        if running.len() == 2 {
            running.pop_front().map(&mut collect).transpose()?;
        }
    }
    running.into_iter().try_for_each(&mut collect)?;
    if done != tokens.len() {
        return Err(Error::Engine(format!("{done} of {} tokens were scored", tokens.len())));
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Perplexity {
        tokens: done,
        windows,
        window,
        nll,
        perplexity: (nll / done as f64).exp(),
        seconds,
        tokens_per_second: done as f64 / seconds,
    })
}
