//! A request inside the scheduler: what it still needs, what it has produced, and the way back to its caller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::completion::{Completion, FinishReason, Piece, Timing, Token, TopToken};
use super::events::EventSender;
use super::stop::Scan;
use super::text::TextStream;
use crate::engine::{ItemOutput, SamplingConfig, ScoredToken};
use crate::{Error, Result};

/// What a caller hears of its job: pieces, then exactly one of the other two.
pub(crate) enum Event {
    Piece(Piece),
    Done(Box<Completion>),
    Failed(Error),
}

/// A checked request with every number resolved.
pub(crate) struct Plan {
    /// At least one token; at least two if nothing is to be generated.
    pub prompt: Vec<u32>,
    /// 0: only the prompt's log-probabilities are wanted.
    pub max_new_tokens: usize,
    pub stop_tokens: Vec<u32>,
    pub sampling: SamplingConfig,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub text: TextStream,
}

pub(crate) struct Job {
    plan: Plan,
    /// Prompt and generated.
    tokens: Vec<u32>,
    generated: Vec<Token>,
    prompt_scores: Vec<Token>,
    text: String,
    cached_prompt_tokens: Option<usize>,
    submitted: Instant,
    timing: Timing,
    events: EventSender,
    cancelled: Arc<AtomicBool>,
}

impl Job {
    pub fn new(plan: Plan, events: EventSender, cancelled: Arc<AtomicBool>) -> Self {
        Job {
            tokens: plan.prompt.clone(),
            plan,
            generated: Vec::new(),
            prompt_scores: Vec::new(),
            text: String::new(),
            cached_prompt_tokens: None,
            submitted: Instant::now(),
            timing: Timing::default(),
            events,
            cancelled,
        }
    }

    /// Known tokens: the prompt, then what was generated.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn prompt_tokens(&self) -> usize {
        self.plan.prompt.len()
    }

    pub fn sampling(&self) -> &SamplingConfig {
        &self.plan.sampling
    }

    pub fn generates(&self) -> bool {
        self.plan.max_new_tokens > 0
    }

    /// Tokens still to be generated.
    pub fn left(&self) -> usize {
        self.plan.max_new_tokens - self.generated.len()
    }

    /// Whether its next step depends on everything the step before gave: on the tokens, for penalties, or on scores.
    pub fn looks_back(&self) -> bool {
        let sampling = &self.plan.sampling;
        sampling.repetition_penalty != 1.0
            || sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0
            || self.unscored().is_some()
    }

    /// How many of the known tokens must be fed: all to generate the next one, all but the last to score them.
    pub fn to_feed(&self) -> usize {
        if self.generates() { self.tokens.len() } else { self.tokens.len() - 1 }
    }

    /// The first position that must be fed to score its successor; `None` if no score is missing.
    pub fn unscored(&self) -> Option<usize> {
        let scored = self.prompt_scores.len();
        (self.plan.prompt_logprobs.is_some() && scored + 1 < self.prompt_tokens()).then_some(scored)
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// It entered the batch, for the first time or again after it had to give its pages back.
    pub fn admitted(&mut self, cached: usize) {
        if self.cached_prompt_tokens.is_none() {
            self.cached_prompt_tokens = Some(cached.min(self.prompt_tokens()));
            self.timing.queued = self.submitted.elapsed();
        }
    }

    /// Takes over what a step computed and passes new text on. Returns why the job is finished, if it is.
    pub fn advance(&mut self, output: ItemOutput) -> Result<Option<FinishReason>> {
        let top = self.plan.prompt_logprobs.unwrap_or(0);
        self.prompt_scores.extend(output.scored.into_iter().map(|scored| token(scored, top)));
        if !self.generates() {
            return Ok(self.unscored().is_none().then_some(FinishReason::Length));
        }
        match output.sampled.into_iter().next() {
            Some(sampled) => self.accept(sampled),
            None => Ok(None),
        }
    }

    fn accept(&mut self, sampled: ScoredToken) -> Result<Option<FinishReason>> {
        let token = token(sampled, self.plan.logprobs.unwrap_or(0));
        let id = token.id;
        self.timing.first_token.get_or_insert_with(|| self.submitted.elapsed());
        self.tokens.push(id);
        self.generated.push(token.clone());
        // A stop token ends the text, it is no part of it.
        let stop = self.plan.stop_tokens.contains(&id);
        let scan = if stop { Scan::Text(String::new()) } else { self.plan.text.push(id)? };
        let (text, found) = match scan {
            Scan::Text(text) => (text, false),
            Scan::Stopped(text) => (text, true),
        };
        self.send(text, vec![token]);
        Ok(match (stop, found) {
            (true, _) => Some(FinishReason::Stop),
            (_, true) => Some(FinishReason::StopString),
            _ if self.generated.len() >= self.plan.max_new_tokens => Some(FinishReason::Length),
            _ => None,
        })
    }

    /// Ends the job and hands the completion to its caller.
    pub fn finish(mut self, mut reason: FinishReason) {
        if reason != FinishReason::StopString {
            match self.plan.text.finish() {
                Ok(Scan::Text(text)) => self.release(text),
                Ok(Scan::Stopped(text)) => {
                    self.release(text);
                    reason = FinishReason::StopString;
                }
                Err(error) => return self.fail(error),
            }
        }
        self.timing.total = self.submitted.elapsed();
        if self.cached_prompt_tokens.is_none() {
            self.timing.queued = self.timing.total; // it never got in
        }
        let completion = Completion {
            text: self.text,
            token_ids: self.tokens.split_off(self.plan.prompt.len()),
            finish_reason: reason,
            logprobs: self.plan.logprobs.map(|_| self.generated),
            prompt_logprobs: self.plan.prompt_logprobs.map(|_| self.prompt_scores),
            seed: (self.plan.sampling.temperature > 0.0).then_some(self.plan.sampling.seed),
            cached_prompt_tokens: self.cached_prompt_tokens.unwrap_or(0),
            prompt_token_ids: self.plan.prompt,
            timing: self.timing,
        };
        self.events.send(Event::Done(Box::new(completion)));
    }

    pub fn fail(self, error: Error) {
        self.events.send(Event::Failed(error));
    }

    fn release(&mut self, text: String) {
        if !text.is_empty() {
            self.send(text, Vec::new());
        }
    }

    fn send(&mut self, text: String, tokens: Vec<Token>) {
        self.text.push_str(&text);
        self.events.send(Event::Piece(Piece { text, tokens }));
    }
}

fn token(scored: ScoredToken, top: u32) -> Token {
    let likeliest = scored.top.iter().take(top as usize);
    Token {
        id: scored.token,
        logprob: scored.logprob,
        top: likeliest.map(|t| TopToken { id: t.token, logprob: t.logprob }).collect(),
    }
}
