//! From a checkpoint to an engine that can step, and that engine as the scheduler sees it.

use crate::checkpoint::Checkpoint;
use crate::engine::{
    Engine, EngineOptions, EngineStatistics, ItemOutput, MemoryBudget, ModelSpec, SamplingConfig, StepItem,
    memory_budget,
};
use crate::generate::{Core, Limits};
use crate::{Error, LoadOptions, Result};

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights handed to the device.
    pub done: u64,
    /// Bytes of all weights.
    pub total: u64,
}

pub(crate) struct Loaded {
    pub engine: Engine,
    pub options: EngineOptions,
    /// One line: backend, instruction set or GPU, threads.
    pub device: String,
}

impl Loaded {
    pub fn limits(&self) -> Limits {
        let EngineOptions { max_batch_tokens, max_sequences, padded, .. } = self.options;
        Limits {
            page_size: self.options.page_size as usize,
            pages: self.options.pages as usize,
            max_batch_tokens: max_batch_tokens as usize,
            max_chunk: (if padded { max_batch_tokens / max_sequences } else { max_batch_tokens }) as usize,
            max_sequences: max_sequences as usize,
            max_logit_rows: self.options.max_logit_rows as usize,
        }
    }
}

/// Everything that can be refused is refused before the first weight is read.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded> {
    let (options, budget) = options.plan(checkpoint)?;
    tracing::info!("memory: {budget}");
    let mut engine = Engine::new(checkpoint.spec(), &options)?;
    let mut done = 0;
    let total = checkpoint.tensors().map(|tensor| tensor.bytes().len() as u64).sum();
    progress(LoadProgress { done, total });
    for tensor in checkpoint.tensors() {
        engine.load_tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes())?;
        done += tensor.bytes().len() as u64;
        progress(LoadProgress { done, total });
    }
    engine.finish_loading()?;
    let device = engine.device_name();
    Ok(Loaded { engine, options, device })
}

/// An engine of this shape with random weights, made where the device is.
pub(crate) fn load_random(spec: &ModelSpec, options: &LoadOptions, seed: u64) -> Result<Loaded> {
    let options = options.resolve(spec, true)?;
    tracing::info!("memory: {}", memory_budget(spec, &options)?);
    let mut engine = Engine::new(spec, &options)?;
    engine.load_random(seed)?;
    engine.finish_loading()?;
    let device = engine.device_name();
    Ok(Loaded { engine, options, device })
}

impl LoadOptions {
    /// What an engine for this checkpoint would be built with, and the bytes it would take. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names an option that is out of range.
    pub fn plan(&self, checkpoint: &Checkpoint) -> Result<(EngineOptions, MemoryBudget)> {
        let exact_in_bf16 = checkpoint.is_bf16();
        let options = self.resolve(checkpoint.spec(), exact_in_bf16)?;
        let budget = memory_budget(checkpoint.spec(), &options)?;
        Ok((options, budget))
    }
}

impl Core for Engine {
    fn add_sequence(
        &mut self,
        tokens: &[u32],
        prompt_tokens: u32,
        sampling: &SamplingConfig,
        reuse_prefix: bool,
    ) -> Result<u32> {
        Engine::add_sequence(self, tokens, prompt_tokens, sampling, reuse_prefix)
    }

    fn remove_sequence(&mut self, sequence: u32) -> Result<()> {
        Engine::remove_sequence(self, sequence)
    }

    fn cached_tokens(&self, sequence: u32) -> Result<usize> {
        Ok(self.sequence_state(sequence)?.cached as usize)
    }

    fn free_pages(&self) -> usize {
        Engine::free_pages(self) as usize
    }

    fn pages_for(&self, sequence: u32, tokens: usize) -> Result<usize> {
        let tokens = u32::try_from(tokens).map_err(|_| Error::Engine(format!("a step of {tokens} tokens")))?;
        Ok(Engine::pages_for(self, sequence, tokens)? as usize)
    }

    fn launch(&mut self, items: &[StepItem]) -> Result<()> {
        Engine::launch(self, items)
    }

    fn collect(&mut self) -> Result<Vec<ItemOutput>> {
        Engine::collect(self)
    }

    fn runs_ahead(&self) -> bool {
        Engine::runs_ahead(self)
    }

    fn statistics(&self) -> EngineStatistics {
        Engine::statistics(self)
    }

    fn copy_bandwidth(&mut self) -> Result<f64> {
        Engine::copy_bandwidth(self)
    }
}
