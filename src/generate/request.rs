//! What a caller asks for.

use crate::checkpoint::Message;
use crate::{Error, Result, SamplingParams};

/// Most likeliest tokens a request may have reported at one position.
pub const MAX_LOGPROBS: u32 = 20;

/// New tokens of a request that does not say how many it wants.
pub const DEFAULT_MAX_NEW_TOKENS: usize = 256;

/// What to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Plain text; the tokenizer puts the beginning-of-sequence token in front.
    Text(String),
    /// Token ids, taken as they are. Needs no tokenizer.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the checkpoint's chat template up to where the model answers.
    Chat(Vec<Message>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Prompt::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Prompt::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Prompt::Tokens(tokens)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Prompt::Chat(messages)
    }
}

/// One generation: a prompt, how to sample, when to stop, what to report.
///
/// Numbers are checked when the request is given to [`Gemma::generate`](crate::Gemma::generate).
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub(crate) prompt: Prompt,
    pub(crate) sampling: SamplingParams,
    pub(crate) max_new_tokens: Option<usize>,
    pub(crate) min_new_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
}

impl Request {
    /// Continue a text, token ids or a conversation, with the checkpoint's own sampling.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Request {
            prompt: prompt.into(),
            sampling: SamplingParams::default(),
            max_new_tokens: None,
            min_new_tokens: 0,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    /// How tokens are picked; what is left open is as the checkpoint has it.
    pub fn sampling(self, sampling: SamplingParams) -> Self {
        Request { sampling, ..self }
    }

    /// At least 1. A prompt that leaves no room for so many is refused. Without this call: as many as fit, at most
    /// [`DEFAULT_MAX_NEW_TOKENS`].
    pub fn max_new_tokens(self, tokens: usize) -> Self {
        Request { max_new_tokens: Some(tokens), ..self }
    }

    /// Until so many tokens were generated no stop token can be sampled, and stop strings are not looked for in their
    /// text. 0 by default; at most the maximum.
    pub fn min_new_tokens(self, tokens: usize) -> Self {
        Request { min_new_tokens: tokens, ..self }
    }

    /// Ends the generation where one of these strings is completed; the string is not part of the text. Needs a
    /// tokenizer; none may be empty.
    pub fn stop(self, strings: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Request { stop: strings.into_iter().map(Into::into).collect(), ..self }
    }

    /// Ends the generation at one of these tokens, beside those the checkpoint names.
    pub fn stop_tokens(self, tokens: impl IntoIterator<Item = u32>) -> Self {
        Request { stop_tokens: tokens.into_iter().collect(), ..self }
    }

    /// Do not end at the checkpoint's end-of-sequence tokens.
    pub fn ignore_eos(self, ignore: bool) -> Self {
        Request { ignore_eos: ignore, ..self }
    }

    /// Report the log-probability of every generated token, and so many of the likeliest tokens beside it (0 to
    /// [`MAX_LOGPROBS`]).
    pub fn logprobs(self, top: u32) -> Self {
        Request { logprobs: Some(top), ..self }
    }

    /// Report the log-probability of every prompt token but the first, and so many of the likeliest tokens beside it
    /// (0 to [`MAX_LOGPROBS`]). Such a prompt is always computed whole, never taken from the prefix cache.
    pub fn prompt_logprobs(self, top: u32) -> Self {
        Request { prompt_logprobs: Some(top), ..self }
    }

    /// Checks what needs neither tokenizer nor model.
    pub(crate) fn validate(&self) -> Result<()> {
        let invalid = |message: String| Err(Error::InvalidArgument(message));
        if match &self.prompt {
            Prompt::Text(text) => text.is_empty(),
            Prompt::Tokens(tokens) => tokens.is_empty(),
            Prompt::Chat(messages) => messages.is_empty(),
        } {
            return invalid("the prompt is empty; it needs at least one token".into());
        }
        if self.max_new_tokens == Some(0) {
            return invalid("max_new_tokens is 0; it must be at least 1".into());
        }
        if let Some(max) = self.max_new_tokens.filter(|&max| self.min_new_tokens > max) {
            return invalid(format!("min_new_tokens is {}, more than max_new_tokens ({max})", self.min_new_tokens));
        }
        if self.stop.iter().any(String::is_empty) {
            return invalid("a stop string is empty; it would stop before the first token".into());
        }
        for (name, value) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(top) = value.filter(|&top| top > MAX_LOGPROBS) {
                return invalid(format!("{name} is {top}; it must be between 0 and {MAX_LOGPROBS}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_requests_are_refused_by_name() {
        let request = || Request::new(vec![2]);
        let cases = [
            (Request::new(""), "prompt is empty"),
            (Request::new(Vec::<u32>::new()), "prompt is empty"),
            (Request::new(Vec::<Message>::new()), "prompt is empty"),
            (request().max_new_tokens(0), "max_new_tokens is 0"),
            (request().max_new_tokens(3).min_new_tokens(4), "min_new_tokens is 4"),
            (request().stop(["x", ""]), "stop string is empty"),
            (request().logprobs(21), "logprobs is 21"),
            (request().prompt_logprobs(99), "prompt_logprobs is 99"),
        ];
        for (request, expected) in cases {
            match request.validate() {
                Err(Error::InvalidArgument(message)) => assert!(message.contains(expected), "{message}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
        assert!(request().max_new_tokens(1).logprobs(MAX_LOGPROBS).stop(["\n"]).validate().is_ok());
    }
}
