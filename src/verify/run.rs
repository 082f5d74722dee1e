//! Drives an engine the way the golden values were made: one prompt at a time, in chunks.

use super::GreedyReport;
use super::golden::GoldenLayer;
use super::stats::{Distance, HiddenError, LogitStats};
use crate::engine::{Engine, ItemOutput, ModelSpec, SamplingConfig, StepItem};
use crate::generate::Limits;
use crate::load::Loaded;
use crate::{Error, Result};

pub(super) struct Runner {
    engine: Engine,
    limits: Limits,
    vocab_size: usize,
    hidden_size: usize,
}

impl Runner {
    pub fn new(loaded: Loaded, spec: &ModelSpec) -> Self {
        Runner {
            limits: loaded.limits(),
            engine: loaded.engine,
            vocab_size: spec.vocab_size as usize,
            hidden_size: spec.hidden_size as usize,
        }
    }

    /// The logits after each of the tokens, against the golden rows.
    pub fn logits(&mut self, tokens: &[u32], golden: &[f32]) -> Result<LogitStats> {
        let vocab_size = self.vocab_size;
        let mut stats = LogitStats::default();
        let mut golden = golden.chunks_exact(vocab_size);
        self.feed(
            tokens,
            |item| StepItem { logits: true, ..item },
            |output, fed| {
                let rows = output.logits[..fed * vocab_size].chunks_exact(vocab_size);
                rows.zip(&mut golden).for_each(|(ours, golden)| stats.add_row(golden, ours));
            },
        )?;
        Ok(stats)
    }

    /// The hidden states over a prompt, against those of the golden layers.
    pub fn hidden(&mut self, tokens: &[u32], golden: &[GoldenLayer]) -> Result<Vec<HiddenError>> {
        if golden.is_empty() {
            return Ok(Vec::new());
        }
        let hidden_size = self.hidden_size;
        let mut distances = vec![Distance::default(); golden.len()];
        let mut start = 0;
        self.feed(
            tokens,
            |item| StepItem { hidden: true, ..item },
            |output, fed| {
                let width = fed * hidden_size;
                for (distance, golden) in distances.iter_mut().zip(golden) {
                    let ours = &output.hidden[golden.layer * width..][..width];
                    distance.add(&golden.values[start..][..width], ours);
                }
                start += width;
            },
        )?;
        Ok(distances.iter().zip(golden).map(|(distance, golden)| distance.of_layer(golden.layer)).collect())
    }

    /// How far a greedy generation goes along with the golden one.
    pub fn greedy(&mut self, prompt: &[u32], golden: &[u32]) -> Result<GreedyReport> {
        let mut generated = Vec::new();
        let sequence = self.add(prompt)?;
        while generated.len() < golden.len() {
            let state = self.engine.sequence_state(sequence)?;
            let left = state.tokens - state.cached;
            let tokens = left.min(self.limits.max_batch_tokens as u32);
            let output = self.step(StepItem { sample: tokens == left, ..StepItem::feed(sequence, tokens) })?;
            generated.extend(output.sampled.iter().map(|token| token.token));
        }
        self.engine.remove_sequence(sequence)?;
        let equal = generated.iter().zip(golden).take_while(|(ours, golden)| ours == golden).count();
        Ok(GreedyReport { tokens: golden.len(), equal })
    }

    /// Feeds a sequence from its beginning to its end; `take` gets each step's output and the number of tokens fed.
    fn feed(
        &mut self,
        tokens: &[u32],
        ask: fn(StepItem) -> StepItem,
        mut take: impl FnMut(&ItemOutput, usize),
    ) -> Result<()> {
        let sequence = self.add(tokens)?;
        for chunk in tokens.chunks(self.limits.max_logit_rows.min(self.limits.max_batch_tokens)) {
            let output = self.step(ask(StepItem::feed(sequence, chunk.len() as u32)))?;
            take(&output, chunk.len());
        }
        self.engine.remove_sequence(sequence)
    }

    fn add(&mut self, tokens: &[u32]) -> Result<u32> {
        self.engine.add_sequence(tokens, tokens.len() as u32, &SamplingConfig::default(), false)
    }

    fn step(&mut self, item: StepItem) -> Result<ItemOutput> {
        let output = self.engine.step(&[item])?.pop();
        let output = output.ok_or_else(|| Error::Engine("a step returned nothing".into()))?;
        if output.failure.is_empty() { Ok(output) } else { Err(Error::Engine(output.failure)) }
    }
}
