//! The engine itself: a model on a device, its paged KV cache, and the step that moves sequences on.
//!
//! This is the layer below [`crate::Gemma`], for those who schedule on their own: plain data in, plain data out.

use std::fmt;

use crate::bridge::ffi;
use crate::error::Result;
use crate::options::bytes_text;

pub use crate::bridge::ffi::{
    DType, EngineOptions, EngineStatistics, ItemOutput, LayerSpec, MemoryBudget, ModelSpec, Observation,
    SamplingConfig, Scheme, ScoredToken, SequenceState, StepItem, TensorSlot, TokenBias, TokenLogprob,
};

impl Default for EngineOptions {
    /// bf16 on the best device there is, a KV cache of 8192 tokens.
    fn default() -> Self {
        EngineOptions {
            device: "auto".into(),
            compute: DType::BF16,
            weights: DType::BF16,
            page_size: 32,
            pages: 256,
            max_batch_tokens: 256,
            max_sequences: 64,
            max_logit_rows: 64,
            threads: 0,
            graphs: true,
            prefix_cache: true,
            padded: false,
        }
    }
}

impl Default for Scheme {
    fn default() -> Self {
        Scheme::Plain
    }
}

impl Default for SamplingConfig {
    /// Greedy.
    fn default() -> Self {
        SamplingConfig {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            stop_tokens: Vec::new(),
            min_new_tokens: 0,
            top_logprobs: 0,
        }
    }
}

impl EngineStatistics {
    /// What was done after `before` was taken; memory is as it is now.
    #[must_use]
    pub fn since(&self, before: &EngineStatistics) -> EngineStatistics {
        EngineStatistics {
            steps: self.steps - before.steps,
            captured_steps: self.captured_steps - before.captured_steps,
            tokens: self.tokens - before.tokens,
            bytes_read: self.bytes_read - before.bytes_read,
            flops: self.flops - before.flops,
            ..*self
        }
    }
}

impl StepItem {
    /// Feeds the next `tokens` known tokens of `sequence` and asks for nothing.
    pub fn feed(sequence: u32, tokens: u32) -> Self {
        StepItem { sequence, tokens, sample: false, score: false, logits: false, hidden: false }
    }
}

/// The canonical name of a checkpoint's tensor, its prefix normalized; `None` for a tensor of a vision tower, which
/// text generation leaves aside.
pub fn canonical_tensor_name(name: &str) -> Option<String> {
    Some(ffi::canonical_tensor_name(name)).filter(|name| !name.is_empty())
}

/// What the text of `config.json` says of a model, in any form Gemma 1, 2 and 3 have been published in.
///
/// # Errors
/// `InvalidArgument` naming the member at fault.
pub(crate) fn parse_config(json: &str) -> Result<ffi::ModelConfig> {
    Ok(ffi::parse_config(json)?)
}

/// Every tensor a checkpoint of this model holds, in the order of the forward pass.
///
/// # Errors
/// `InvalidArgument` naming the number in `spec` that cannot be.
pub fn tensor_table(spec: &ModelSpec) -> Result<Vec<TensorSlot>> {
    Ok(ffi::tensor_table(spec)?)
}

/// Row-major `bytes` in FP8 (E4M3), each element divided by its row's scale, to nearest even and saturating at 448; there
/// are as many rows as scales.
///
/// # Errors
/// `InvalidArgument` for scales that are not positive and finite, or do not divide the elements.
pub fn quantize_e4m3(dtype: DType, bytes: &[u8], scales: &[f32]) -> Result<Vec<u8>> {
    Ok(ffi::quantize_e4m3(dtype, bytes, scales)?)
}

/// Bytes an engine with these options would take; nothing is allocated.
///
/// # Errors
/// `InvalidArgument` naming the number that cannot be.
pub fn memory_budget(spec: &ModelSpec, options: &EngineOptions) -> Result<MemoryBudget> {
    Ok(ffi::memory_budget(spec, options)?)
}

/// For a person.
impl fmt::Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [self.total, self.weights, self.kv_cache, self.activations, self.logits, self.workspace];
        let [total, weights, kv_cache, activations, logits, workspace] = parts.map(bytes_text);
        write!(
            f,
            "{total}: weights {weights}, KV cache {kv_cache}, activations {activations}, logits {logits}, workspace \
             {workspace}"
        )
    }
}

/// A model on a device with its KV cache. `Send`, not `Sync`: one thread at a time.
///
/// Every call either does what it says or returns an error and changes nothing.
///
/// A device that fails in a step ends the engine: the [`Error::Device`](crate::Error::Device) names the step, and from
/// then on every step is refused with it. CUDA gives a process one context a GPU, so a kernel's fault there ends all
/// engines of the process on that GPU, each with its own error at its next step; those on other devices live on, and a
/// new process can use the GPU again.
pub struct Engine {
    core: cxx::UniquePtr<ffi::Engine>,
}

impl Engine {
    /// Allocates everything the engine will ever need: what [`memory_budget`] says.
    ///
    /// # Errors
    /// `InvalidArgument` naming the number that cannot be, `Device` where the device cannot be had, or has too little
    /// memory: then it says what would fit.
    pub fn new(spec: &ModelSpec, options: &EngineOptions) -> Result<Self> {
        Ok(Engine { core: ffi::new_engine(spec, options)? })
    }

    /// One line for a person: backend, instruction set or GPU, threads.
    pub fn device_name(&self) -> String {
        self.core.device_name()
    }

    /// Hands over one tensor by its canonical name: row-major little-endian `bytes`, converted to what the engine
    /// keeps.
    ///
    /// # Errors
    /// `InvalidArgument` for a name the model does not have or that came before, or a shape that does not fit.
    pub fn load_tensor(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: &[u8]) -> Result<()> {
        Ok(self.core.pin_mut().load_tensor(name, dtype, shape, bytes)?)
    }

    /// Fills the model with random weights instead, for measuring a shape without its weights.
    ///
    /// # Errors
    /// `Device` where the device fails.
    pub fn load_random(&mut self, seed: u64) -> Result<()> {
        Ok(self.core.pin_mut().load_random(seed)?)
    }

    /// To be called after the last tensor.
    ///
    /// # Errors
    /// `InvalidArgument` naming a tensor that is missing; `Device` where steps cannot be recorded.
    pub fn finish_loading(&mut self) -> Result<()> {
        Ok(self.core.pin_mut().finish_loading()?)
    }

    /// Starts a sequence of known `tokens`: the first `prompt_tokens` are the prompt, the rest count as generated (for
    /// penalties and for the steps of the seed). With `reuse_prefix`, whole pages that another sequence left behind
    /// are taken over. Returns the sequence's number.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or too long sequence, a token outside the embedding, or when all sequences are
    /// taken.
    pub fn add_sequence(
        &mut self,
        tokens: &[u32],
        prompt_tokens: u32,
        sampling: &SamplingConfig,
        reuse_prefix: bool,
    ) -> Result<u32> {
        Ok(self.core.pin_mut().add_sequence(tokens, prompt_tokens, sampling, reuse_prefix)?)
    }

    /// Adds known tokens to the end of a sequence.
    ///
    /// # Errors
    /// `InvalidArgument` for a token outside the embedding or a sequence that would grow too long.
    pub fn append_tokens(&mut self, sequence: u32, tokens: &[u32]) -> Result<()> {
        Ok(self.core.pin_mut().append_tokens(sequence, tokens)?)
    }

    /// Ends a sequence; its pages are free again.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such sequence.
    pub fn remove_sequence(&mut self, sequence: u32) -> Result<()> {
        Ok(self.core.pin_mut().remove_sequence(sequence)?)
    }

    /// Where a sequence stands.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such sequence.
    pub fn sequence_state(&self, sequence: u32) -> Result<SequenceState> {
        Ok(self.core.sequence_state(sequence)?)
    }

    /// Pages of the KV cache that can be had now, those kept only for reuse included.
    pub fn free_pages(&self) -> u32 {
        self.core.free_pages()
    }

    /// Pages a sequence must take from the free ones to feed its next `tokens` tokens.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such sequence.
    pub fn pages_for(&self, sequence: u32, tokens: u32) -> Result<u32> {
        Ok(self.core.pages_for(sequence, tokens)?)
    }

    /// One forward pass over any mix of prefill chunks and decode rows; outputs in the order of `items`.
    ///
    /// # Errors
    /// `InvalidArgument` for an item that cannot be, `OutOfPages` where the KV cache is too full: nothing has changed
    /// then. `Device` where the device failed: that is the end of the engine.
    pub fn step(&mut self, items: &[StepItem]) -> Result<Vec<ItemOutput>> {
        Ok(self.core.pin_mut().step(items)?)
    }

    /// The first half of a step: returns once the device has it. The token it samples counts as known from then on, so
    /// the step that feeds it can be launched before [`Engine::collect`] says which it is, and the device never waits
    /// for the host. Two steps may be launched and not collected. A sequence may be removed in between; its outputs are
    /// empty then. A sequence with penalties is sampled only when none of its tokens is outstanding.
    ///
    /// # Errors
    /// Those of [`Engine::step`].
    pub fn launch(&mut self, items: &[StepItem]) -> Result<()> {
        Ok(self.core.pin_mut().launch(items)?)
    }

    /// Waits for the oldest launched step; outputs in the order of its items.
    ///
    /// # Errors
    /// `InvalidArgument` if none is launched; `Device` if the device failed. A sequence whose logits are not finite says
    /// so in its output; the others go on.
    pub fn collect(&mut self) -> Result<Vec<ItemOutput>> {
        Ok(self.core.pin_mut().collect()?)
    }

    /// Whether launching ahead gains anything: the CPU has computed when [`Engine::launch`] returns.
    pub fn runs_ahead(&self) -> bool {
        self.core.runs_ahead()
    }

    /// From now on every step gathers the magnitudes of all activations; what was gathered before is forgotten.
    ///
    /// # Errors
    /// `InvalidArgument` for a model that is in FP8 already.
    pub fn start_calibration(&mut self) -> Result<()> {
        Ok(self.core.pin_mut().start_calibration()?)
    }

    /// What was gathered since [`Engine::start_calibration`].
    ///
    /// # Errors
    /// `InvalidArgument` if calibration was not started.
    pub fn calibration(&self) -> Result<Vec<Observation>> {
        Ok(self.core.calibration()?)
    }

    /// What has been done since the engine was made. Costs nothing.
    pub fn statistics(&self) -> EngineStatistics {
        self.core.statistics()
    }

    /// Bytes read and written in a second by a copy within the device's memory: the ceiling of whatever is bound by
    /// memory. Measured now, in some tenths of a second, with up to 2 GiB that are given back.
    ///
    /// # Errors
    /// `Device` where too little memory is free.
    pub fn copy_bandwidth(&mut self) -> Result<f64> {
        Ok(self.core.pin_mut().copy_bandwidth()?)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("device", &self.device_name()).field("free_pages", &self.free_pages()).finish()
    }
}
