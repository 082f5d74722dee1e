//! Continuous batching: which sequences are in the engine, and what each of them does in the next step.
//!
//! The policy, without threads:
//! - First come, first served. A job enters when a slot is free and the free pages hold all its known tokens, with
//!   some left for the others to grow.
//! - A step first moves on everyone who needs a single token, then computes prompts, the oldest first, in chunks: of the
//!   token budget they get as large a part as theirs is of the batch, in round numbers (`TOKENS_AT_ONCE`). A batch that
//!   only begins is filled at full speed; one prompt beside many that generate adds few rows to their step, which
//!   reading the weights hides.
//! - On a device that works on its own, a step is launched before the one before it is collected, so that the device
//!   never waits. A job that turns out to have ended has then been computed one token too far, which is dropped.
//! - When pages run out, the youngest gives its own back and waits at the head of the queue; its tokens are computed
//!   again later. The oldest never gives way, and everyone becomes the oldest, so everyone finishes.

use std::collections::VecDeque;

use super::completion::FinishReason;
use super::job::Job;
use crate::engine::{EngineStatistics, ItemOutput, SamplingConfig, StepItem};
use crate::{Error, Result};

/// Tokens of a step with prompts are a multiple of this, where the budget and the prompts have as many: products take
/// 128 or 256 at a time, and a few more cost as much as all of them.
const TOKENS_AT_ONCE: usize = 256;

/// What the scheduler needs of an engine; the contract is that of [`crate::bridge`].
pub(crate) trait Core {
    fn add_sequence(
        &mut self,
        tokens: &[u32],
        prompt_tokens: u32,
        sampling: &SamplingConfig,
        reuse_prefix: bool,
    ) -> Result<u32>;
    fn remove_sequence(&mut self, sequence: u32) -> Result<()>;
    /// Tokens of a sequence whose keys and values are in the cache.
    fn cached_tokens(&self, sequence: u32) -> Result<usize>;
    fn free_pages(&self) -> usize;
    fn pages_for(&self, sequence: u32, tokens: usize) -> Result<usize>;
    fn launch(&mut self, items: &[StepItem]) -> Result<()>;
    /// Waits for the oldest launched step.
    fn collect(&mut self) -> Result<Vec<ItemOutput>>;
    /// Whether a second step may be launched before the first is collected, and should be.
    fn runs_ahead(&self) -> bool;
    fn statistics(&self) -> EngineStatistics;
    fn copy_bandwidth(&mut self) -> Result<f64>;
}

/// What the engine was built with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub page_size: usize,
    pub pages: usize,
    /// At least `max_sequences`, so that a step has a token for everyone.
    pub max_batch_tokens: usize,
    /// New tokens of one sequence in a step; at least 1.
    pub max_chunk: usize,
    pub max_sequences: usize,
    /// At least `max_sequences`, so that a step has a row for everyone.
    pub max_logit_rows: usize,
}

impl Limits {
    fn pages_of(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_size)
    }

    /// Tokens that fit the whole cache.
    pub fn cache_tokens(&self) -> usize {
        self.pages * self.page_size
    }
}

/// How busy a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Requests in the batch.
    pub running: usize,
    /// Requests that wait for a slot or for pages.
    pub waiting: usize,
    /// Pages of the KV cache that can be had, those kept only for reuse included.
    pub free_pages: usize,
    /// Pages of the KV cache.
    pub pages: usize,
}

struct Running {
    job: Job,
    sequence: u32,
    /// No other has or had it; the engine gives a sequence's number out again.
    serial: u64,
    /// Tokens whose keys and values are in the cache once all launched steps are done.
    cached: usize,
    /// Tokens that launched steps sample and that are not collected.
    pending: usize,
}

impl Running {
    /// Tokens to be fed for the next one, the pending ones among them.
    fn to_feed(&self) -> usize {
        self.job.to_feed() + self.pending
    }

    /// Whether it has something to do in the next step.
    fn goes_on(&self) -> bool {
        !self.job.generates() || self.job.left() > self.pending
    }
}

/// An item of a launched step.
#[derive(Clone, Copy)]
struct Launched {
    item: StepItem,
    serial: u64,
}

/// What a step may still take.
struct Budget {
    tokens: usize,
    rows: usize,
    /// Beyond the pages everyone has reserved for its next token.
    pages: usize,
}

pub(crate) struct Scheduler<E> {
    engine: E,
    limits: Limits,
    waiting: VecDeque<Job>,
    /// The oldest first.
    running: Vec<Running>,
    /// Steps that are not collected, the oldest first.
    launched: VecDeque<Vec<Launched>>,
    serials: u64,
}

/// Methods return an error only when the engine breaks its contract; then nothing it holds can be trusted any more.
/// What concerns one request reaches its caller instead.
impl<E: Core> Scheduler<E> {
    pub fn new(engine: E, limits: Limits) -> Self {
        debug_assert!(limits.max_batch_tokens >= limits.max_sequences);
        debug_assert!(limits.max_logit_rows >= limits.max_sequences);
        Scheduler {
            engine,
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            launched: VecDeque::new(),
            serials: 0,
        }
    }

    pub fn submit(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.launched.is_empty()
    }

    pub fn usage(&self) -> Usage {
        Usage {
            running: self.running.len(),
            waiting: self.waiting.len(),
            free_pages: self.engine.free_pages(),
            pages: self.limits.pages,
        }
    }

    pub fn engine(&mut self) -> &mut E {
        &mut self.engine
    }

    /// Launches a step and collects one. Unless the scheduler is idle, at least one job moves on or ends, or a step is on
    /// its way.
    pub fn tick(&mut self) -> Result<()> {
        self.retire_cancelled()?;
        if !self.may_run_ahead()? {
            self.collect_all()?;
        }
        self.admit()?;
        let reserved = self.make_room()?;
        let items = self.plan(reserved)?;
        if items.is_empty() {
            return self.collect_all();
        }
        let launched = items.iter().map(|item| self.tag(*item)).collect::<Result<Vec<_>>>()?;
        if let Err(error) = self.engine.launch(&items) {
            self.collect_all()?;
            return self.step_failed(&launched, error);
        }
        for item in &items {
            let index = self.index_of(item.sequence)?;
            self.running[index].cached += item.tokens as usize;
            self.running[index].pending += usize::from(item.sample);
        }
        self.launched.push_back(launched);
        if self.launched.len() > 1 || !self.engine.runs_ahead() { self.collect() } else { Ok(()) }
    }

    /// Whether the next step can be planned without knowing what the last one gave.
    fn may_run_ahead(&self) -> Result<bool> {
        if self.launched.is_empty() {
            return Ok(true);
        }
        let mut needed = 0;
        for running in self.running.iter().filter(|running| running.goes_on()) {
            needed += self.engine.pages_for(running.sequence, 1)?;
        }
        // Nobody can give way while its last token is unknown.
        Ok(needed <= self.engine.free_pages() && !self.running.iter().any(|running| running.job.looks_back()))
    }

    fn collect_all(&mut self) -> Result<()> {
        while !self.launched.is_empty() {
            self.collect()?;
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<()> {
        let Some(launched) = self.launched.pop_front() else { return Ok(()) };
        match self.engine.collect() {
            Ok(outputs) => self.advance(&launched, outputs),
            Err(error) => self.step_failed(&launched, error),
        }
    }

    fn tag(&self, item: StepItem) -> Result<Launched> {
        Ok(Launched { item, serial: self.running[self.index_of(item.sequence)?].serial })
    }

    pub fn cancel_all(&mut self) -> Result<()> {
        self.waiting.drain(..).for_each(|job| job.finish(FinishReason::Cancelled));
        while let Some(last) = self.running.len().checked_sub(1) {
            self.finish(last, FinishReason::Cancelled)?;
        }
        Ok(())
    }

    /// Ends every job with the error, without touching the engine any more.
    pub fn abandon_all(&mut self, error: &Error) {
        let running = self.running.drain(..).map(|running| running.job);
        running.chain(self.waiting.drain(..)).for_each(|job| job.fail(error.duplicate()));
    }

    fn retire_cancelled(&mut self) -> Result<()> {
        while let Some(job) = self.first_cancelled().and_then(|index| self.waiting.remove(index)) {
            job.finish(FinishReason::Cancelled);
        }
        while let Some(index) = self.running.iter().position(|running| running.job.is_cancelled()) {
            self.finish(index, FinishReason::Cancelled)?;
        }
        Ok(())
    }

    fn first_cancelled(&self) -> Option<usize> {
        self.waiting.iter().position(Job::is_cancelled)
    }

    /// Lets jobs in, in order, while there is a slot and room for all their known tokens and one more, beside what
    /// those already in still need for theirs and a page for each to grow. Without that page, jobs enter only to give
    /// way soon after: a mix of 200 requests over 40 to 160 pages computed 11 to 36% more tokens.
    fn admit(&mut self) -> Result<()> {
        while self.running.len() < self.limits.max_sequences {
            let Some(job) = self.waiting.front() else { break };
            let mut promised = 0;
            for running in &self.running {
                let rest = running.to_feed() - running.cached + self.limits.page_size;
                promised += self.engine.pages_for(running.sequence, rest)?;
            }
            let need = self.limits.pages_of(job.tokens().len() + 1);
            // With nobody in, every page can be had: submission has checked that the job fits.
            if !self.running.is_empty() && need + promised > self.engine.free_pages() {
                break;
            }
            // A position taken from the prefix cache is never fed, so its successor would get no score.
            let reuse_prefix = job.unscored().is_none();
            let prompt_tokens = job.prompt_tokens() as u32;
            let added = self.engine.add_sequence(job.tokens(), prompt_tokens, job.sampling(), reuse_prefix);
            let Some(mut job) = self.waiting.pop_front() else { break };
            match added {
                Ok(sequence) => {
                    let cached = self.engine.cached_tokens(sequence)?;
                    if cached >= job.to_feed() {
                        return Err(Error::Engine(format!(
                            "sequence {sequence} starts with {cached} cached tokens and none to feed"
                        )));
                    }
                    job.admitted(cached);
                    self.serials += 1;
                    self.running.push(Running { job, sequence, serial: self.serials, cached, pending: 0 });
                }
                Err(error) => job.fail(error),
            }
        }
        Ok(())
    }

    /// Makes the youngest give way until everyone left can feed a token; returns the pages this takes.
    fn make_room(&mut self) -> Result<usize> {
        let mut reserved = 0;
        let mut index = 0;
        while index < self.running.len() {
            if !self.running[index].goes_on() {
                index += 1;
                continue;
            }
            let need = self.engine.pages_for(self.running[index].sequence, 1)?;
            if reserved + need <= self.engine.free_pages() {
                reserved += need;
                index += 1;
            } else {
                self.give_way(Error::OutOfPages(format!(
                    "a sequence needs {need} more pages of the KV cache, {} of {} are free",
                    self.engine.free_pages(),
                    self.limits.pages
                )))?;
            }
        }
        Ok(reserved)
    }

    /// The youngest returns its pages and waits at the head of the queue. One that is alone has nobody to wait for.
    fn give_way(&mut self, error: Error) -> Result<()> {
        let alone = self.running.len() == 1;
        let Some(running) = self.running.pop() else { return Ok(()) };
        self.engine.remove_sequence(running.sequence)?;
        if alone {
            running.job.fail(error);
        } else {
            tracing::debug!(sequence = running.sequence, tokens = running.job.tokens().len(), "preempted");
            self.waiting.push_front(running.job);
        }
        Ok(())
    }

    fn plan(&self, reserved: usize) -> Result<Vec<StepItem>> {
        let mut budget = Budget {
            tokens: self.limits.max_batch_tokens,
            rows: self.limits.max_logit_rows,
            pages: self.engine.free_pages() - reserved,
        };
        let mut items = Vec::with_capacity(self.running.len());
        let (single, many): (Vec<_>, Vec<_>) = self
            .running
            .iter()
            .filter(|running| running.goes_on())
            .partition(|running| running.to_feed() - running.cached == 1);
        for running in &single {
            items.extend(self.plan_item(running, &mut budget)?);
        }
        budget.tokens = budget.tokens.min(self.tokens_for_prompts(single.len(), many.len()));
        for running in &many {
            items.extend(self.plan_item(running, &mut budget)?);
        }
        Ok(items)
    }

    /// Tokens that the prompts of a step may take beside those who need a single one.
    fn tokens_for_prompts(&self, single: usize, prompts: usize) -> usize {
        let share = self.limits.max_batch_tokens * prompts / (single + prompts).max(1);
        if single == 0 {
            return share;
        }
        let total = ((single + share) / TOKENS_AT_ONCE).max(1) * TOKENS_AT_ONCE;
        total.saturating_sub(single).max(1)
    }

    /// As many of the sequence's next tokens as the budget allows, which it reduces.
    fn plan_item(&self, running: &Running, budget: &mut Budget) -> Result<Option<StepItem>> {
        let Running { job, sequence, cached, .. } = running;
        let mut tokens = (running.to_feed() - cached).min(budget.tokens).min(self.limits.max_chunk);
        let score = match job.unscored() {
            Some(first) if *cached < first => {
                tokens = tokens.min(first - cached); // scored before it had to give way
                false
            }
            Some(_) => {
                tokens = tokens.min(budget.rows);
                true
            }
            None => false,
        };
        let reserved = self.engine.pages_for(*sequence, 1)?;
        while tokens > 0 && self.engine.pages_for(*sequence, tokens)? > reserved + budget.pages {
            // One page less: down to where the last of its pages begins.
            tokens = ((cached + tokens - 1) / self.limits.page_size * self.limits.page_size).saturating_sub(*cached);
        }
        let ends = |tokens| cached + tokens == running.to_feed();
        if job.generates() && ends(tokens) && budget.rows == 0 {
            tokens = tokens.saturating_sub(1);
        }
        if tokens == 0 {
            return Ok(None);
        }
        let sample = job.generates() && ends(tokens);
        budget.tokens -= tokens;
        budget.rows -= if score { tokens } else { usize::from(sample) };
        budget.pages -= self.engine.pages_for(*sequence, tokens)?.saturating_sub(reserved);
        Ok(Some(StepItem { sample, score, ..StepItem::feed(*sequence, tokens as u32) }))
    }

    fn advance(&mut self, launched: &[Launched], outputs: Vec<ItemOutput>) -> Result<()> {
        if outputs.len() != launched.len() {
            return Err(Error::Engine(format!("a step of {} items returned {}", launched.len(), outputs.len())));
        }
        for (Launched { item, serial }, output) in launched.iter().zip(outputs) {
            let Some(index) = self.position(*serial) else { continue }; // it has ended since
            if !output.failure.is_empty() {
                self.fail(index, Error::Engine(output.failure))?;
                continue;
            }
            if output.sequence != item.sequence || item.sample != (output.sampled.len() == 1) {
                return Err(Error::Engine(format!("a step returned no token for sequence {}", item.sequence)));
            }
            self.running[index].pending -= usize::from(item.sample);
            match self.running[index].job.advance(output) {
                Ok(None) => {}
                Ok(Some(reason)) => self.finish(index, reason)?,
                Err(error) => self.fail(index, error)?,
            }
        }
        Ok(())
    }

    /// On error nothing has changed in the engine. Pages can be waited for; anything else ends the step's requests.
    fn step_failed(&mut self, launched: &[Launched], error: Error) -> Result<()> {
        tracing::warn!(%error, sequences = launched.len(), "a step failed");
        if matches!(error, Error::OutOfPages(_)) {
            return self.give_way(error);
        }
        for Launched { serial, .. } in launched {
            if let Some(index) = self.position(*serial) {
                self.fail(index, error.duplicate())?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, index: usize, reason: FinishReason) -> Result<()> {
        let running = self.running.remove(index);
        self.engine.remove_sequence(running.sequence)?;
        running.job.finish(reason);
        Ok(())
    }

    fn fail(&mut self, index: usize, error: Error) -> Result<()> {
        let running = self.running.remove(index);
        self.engine.remove_sequence(running.sequence)?;
        running.job.fail(error);
        Ok(())
    }

    fn position(&self, serial: u64) -> Option<usize> {
        self.running.iter().position(|running| running.serial == serial)
    }

    fn index_of(&self, sequence: u32) -> Result<usize> {
        let index = self.running.iter().position(|running| running.sequence == sequence);
        index.ok_or_else(|| Error::Engine(format!("a step returned sequence {sequence}, which is not running")))
    }
}

#[cfg(test)]
mod tests;
