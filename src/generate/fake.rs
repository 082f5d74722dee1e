//! A test double of the engine: it keeps the books of a paged cache, checks that the scheduler keeps the contract, and
//! fails where a test tells it to, which the real engine cannot do on demand. Its next token depends on all tokens of
//! the sequence, so a sequence that lost or repeated one would show.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::scheduler::{Core, Limits};
use crate::engine::{EngineStatistics, ItemOutput, SamplingConfig, ScoredToken, StepItem};
use crate::{Error, Result};

pub(crate) enum Fault {
    Error(Error),
    Panic,
}

struct Sequence {
    tokens: Vec<u32>,
    cached: usize,
}

pub(crate) struct FakeEngine {
    limits: Limits,
    sequences: BTreeMap<u32, Sequence>,
    added: u32,
    /// Every batch that was asked for, failed ones too.
    pub steps: Vec<Vec<StepItem>>,
    /// What happens at a step, counted from 0.
    pub faults: HashMap<usize, Fault>,
    /// Sequences whose logits are not finite from a step on, by their number.
    pub damaged: HashMap<u32, usize>,
    /// Pages that free_pages() reports but step() does not have, as of an engine that miscounts.
    pub missing_pages: usize,
    pub panics_on_remove: bool,
    /// Whether it asks to be given the next step before the last is collected.
    pub ahead: bool,
    launched: VecDeque<Vec<ItemOutput>>,
}

impl FakeEngine {
    pub fn new(limits: Limits) -> Self {
        FakeEngine {
            limits,
            sequences: BTreeMap::new(),
            added: 0,
            steps: Vec::new(),
            faults: HashMap::new(),
            damaged: HashMap::new(),
            missing_pages: 0,
            panics_on_remove: false,
            ahead: false,
            launched: VecDeque::new(),
        }
    }

    fn held(&self) -> usize {
        self.sequences.values().map(|s| s.cached.div_ceil(self.limits.page_size)).sum()
    }

    fn check(&self, items: &[StepItem]) {
        let tokens: usize = items.iter().map(|item| item.tokens as usize).sum();
        assert!(tokens <= self.limits.max_batch_tokens, "{tokens} tokens in a step");
        let rows = |item: &StepItem| if item.score { item.tokens as usize } else { usize::from(item.sample) };
        assert!(items.iter().map(rows).sum::<usize>() <= self.limits.max_logit_rows);
        for item in items {
            let sequence = &self.sequences[&item.sequence];
            let end = sequence.cached + item.tokens as usize;
            assert!(item.tokens as usize <= self.limits.max_chunk);
            assert!(item.tokens > 0 && end <= sequence.tokens.len());
            assert!(!item.sample || end == sequence.tokens.len());
        }
    }
}

/// What the fake generates after these tokens.
pub(crate) fn successor(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(17u32, |hash, &token| hash.wrapping_mul(31).wrapping_add(token));
    10 + hash % 80
}

fn scored(token: u32) -> ScoredToken {
    ScoredToken { token, logprob: -(token as f32), top: Vec::new() }
}

impl Core for FakeEngine {
    fn add_sequence(&mut self, tokens: &[u32], prompt: u32, _: &SamplingConfig, _: bool) -> Result<u32> {
        assert!(self.sequences.len() < self.limits.max_sequences);
        assert!(prompt as usize <= tokens.len());
        self.added += 1;
        self.sequences.insert(self.added, Sequence { tokens: tokens.to_vec(), cached: 0 });
        Ok(self.added)
    }

    fn remove_sequence(&mut self, sequence: u32) -> Result<()> {
        assert!(!self.panics_on_remove, "a bug in remove_sequence");
        let removed = self.sequences.remove(&sequence);
        removed.map(|_| ()).ok_or_else(|| Error::Engine(format!("no sequence {sequence}")))
    }

    fn cached_tokens(&self, sequence: u32) -> Result<usize> {
        Ok(self.sequences[&sequence].cached)
    }

    fn free_pages(&self) -> usize {
        self.limits.pages - self.held()
    }

    fn pages_for(&self, sequence: u32, tokens: usize) -> Result<usize> {
        let cached = self.sequences[&sequence].cached;
        Ok((cached + tokens).div_ceil(self.limits.page_size) - cached.div_ceil(self.limits.page_size))
    }

    fn launch(&mut self, items: &[StepItem]) -> Result<()> {
        assert!(self.launched.len() < 2, "too far ahead");
        self.steps.push(items.to_vec());
        match self.faults.remove(&(self.steps.len() - 1)) {
            Some(Fault::Error(error)) => return Err(error),
            Some(Fault::Panic) => panic!("a bug in the engine"),
            None => {}
        }
        self.check(items);
        let mut pages = 0;
        for item in items {
            pages += self.pages_for(item.sequence, item.tokens as usize)?;
        }
        assert!(pages <= self.free_pages(), "the scheduler overdrew the cache");
        if pages + self.missing_pages > self.free_pages() {
            return Err(Error::OutOfPages("pages are missing".into()));
        }
        let mut outputs = Vec::new();
        for item in items {
            let Some(sequence) = self.sequences.get_mut(&item.sequence) else { continue };
            let fed = sequence.cached..sequence.cached + item.tokens as usize;
            sequence.cached = fed.end;
            let successors = fed.map(|position| position + 1).filter_map(|next| sequence.tokens.get(next).copied());
            let scores = if item.score { successors.map(scored).collect() } else { Vec::new() };
            let sampled = item.sample.then(|| successor(&sequence.tokens));
            sequence.tokens.extend(sampled);
            let failed = self.damaged.get(&item.sequence).is_some_and(|&from| self.steps.len() > from);
            outputs.push(ItemOutput {
                sequence: item.sequence,
                sampled: sampled.filter(|_| !failed).map(scored).into_iter().collect(),
                scored: if failed { Vec::new() } else { scores },
                logits: Vec::new(),
                hidden: Vec::new(),
                failure: if failed { "the logits are not finite".into() } else { String::new() },
            });
        }
        self.launched.push_back(outputs);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<ItemOutput>> {
        let mut outputs = self.launched.pop_front().expect("a step is launched");
        for output in outputs.iter_mut().filter(|output| !self.sequences.contains_key(&output.sequence)) {
            output.sampled.clear();
        }
        Ok(outputs)
    }

    fn runs_ahead(&self) -> bool {
        self.ahead
    }

    fn statistics(&self) -> EngineStatistics {
        let tokens = self.steps.iter().flatten().map(|item| u64::from(item.tokens)).sum();
        EngineStatistics { steps: self.steps.len() as u64, tokens, ..Default::default() }
    }

    fn copy_bandwidth(&mut self) -> Result<f64> {
        Err(Error::Device("there is no memory to copy".into()))
    }
}
