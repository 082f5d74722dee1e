//! A loaded model.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{ChatTemplate, Checkpoint, GenerationConfig, Tokenizer};
use crate::engine::{EngineStatistics, ModelSpec, SamplingConfig};
use crate::generate::{
    DEFAULT_MAX_NEW_TOKENS, Generation, Limits, Plan, Prompt, Request, Scheduler, TextStream, Token, Usage, Worker,
};
use crate::load::{self, LoadProgress, Loaded};
use crate::{Error, LoadOptions, Result};

/// A Gemma model on a device, ready to generate.
///
/// Clones are cheap and share one model, which batches the requests of all of them. When the last clone is dropped,
/// running requests end as cancelled and the model's memory is freed.
///
/// ```no_run
/// use gemma_cuda::{Gemma, LoadOptions, Request};
///
/// let model = Gemma::load("gemma-3-270m", LoadOptions::default())?;
/// let mut generation = model.generate(Request::new("The capital of France is").max_new_tokens(32))?;
/// for piece in &mut generation {
///     print!("{}", piece?.text);
/// }
/// let completion = generation.finish()?;
/// println!(" [{} tokens in {:?}]", completion.token_ids.len(), completion.timing.total);
/// # Ok::<(), gemma_cuda::Error>(())
/// ```
#[derive(Clone)]
pub struct Gemma {
    shared: Arc<Shared>,
}

struct Shared {
    worker: Worker,
    spec: ModelSpec,
    limits: Limits,
    device: String,
    generation_config: GenerationConfig,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    /// Tokens that end a generation unless a request says otherwise.
    stop_tokens: Vec<u32>,
}

impl Gemma {
    /// Loads the checkpoint in `dir`: `config.json`, safetensors, and where there are any `generation_config.json`,
    /// `tokenizer.json` and a chat template.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] and [`Error::Checkpoint`] name the file at fault; [`Error::InvalidArgument`] an
    /// option out of range; [`Error::Device`] says why the device cannot be used, or how much memory is missing.
    pub fn load(dir: impl AsRef<Path>, options: LoadOptions) -> Result<Self> {
        Self::load_with_progress(dir, options, |_| {})
    }

    /// The same, telling how far it has come: once at the start and after each tensor.
    pub fn load_with_progress(
        dir: impl AsRef<Path>,
        options: LoadOptions,
        mut progress: impl FnMut(LoadProgress),
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir.as_ref())?;
        if options.check_weights {
            checkpoint.check_weights()?;
        }
        let loaded = load::load(&checkpoint, &options, &mut progress)?;
        tracing::info!(device = loaded.device, limits = ?loaded.limits(), "loaded {}", dir.as_ref().display());
        Self::start(loaded, |shared| Shared {
            stop_tokens: stop_tokens(&checkpoint),
            spec: checkpoint.spec().clone(),
            generation_config: checkpoint.generation_config().clone(),
            tokenizer: checkpoint.tokenizer().cloned(),
            chat_template: checkpoint.chat_template().cloned(),
            ..shared
        })
    }

    /// A model of this shape (see [`named_shape`](crate::checkpoint::named_shape)) with random weights, which are made
    /// on the device: its speed is that of the real one. It takes and gives tokens, and nothing but their number ends a
    /// generation.
    ///
    /// # Errors
    /// Those of [`Gemma::load`] that concern options and the device.
    pub fn random(spec: &ModelSpec, options: &LoadOptions, seed: u64) -> Result<Self> {
        let loaded = load::load_random(spec, options, seed)?;
        Self::start(loaded, |shared| Shared { spec: spec.clone(), ..shared })
    }

    fn start(loaded: Loaded, describe: impl FnOnce(Shared) -> Shared) -> Result<Self> {
        let limits = loaded.limits();
        let shared = Shared {
            stop_tokens: Vec::new(),
            spec: ModelSpec::default(),
            limits,
            device: loaded.device,
            generation_config: GenerationConfig::default(),
            tokenizer: None,
            chat_template: None,
            worker: Worker::spawn(Scheduler::new(loaded.engine, limits))?,
        };
        Ok(Gemma { shared: Arc::new(describe(shared)) })
    }

    /// Starts a generation. It runs at once if there is room, and otherwise after those that came before.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the number that is out of range or the token that is not in the vocabulary;
    /// [`Error::TooLong`] says by how much the request exceeds the model's context or the KV cache;
    /// [`Error::Tokenizer`] if the prompt is text and the checkpoint has no tokenizer, or no chat template for a
    /// conversation. Nothing is started then.
    pub fn generate(&self, request: Request) -> Result<Generation> {
        self.shared.worker.submit(self.plan(request)?)
    }

    /// Starts several generations that enter the batch together, as far as there is room: which of them share a step does
    /// not depend on when the caller got to start each.
    ///
    /// # Errors
    /// Those of [`Gemma::generate`]; if one request is refused, none is started.
    pub fn generate_all(&self, requests: impl IntoIterator<Item = Request>) -> Result<Vec<Generation>> {
        let plans = requests.into_iter().map(|request| self.plan(request)).collect::<Result<_>>()?;
        self.shared.worker.submit_all(plans)
    }

    /// The log-probability of every token but the first, each given all before it: entry `i` is that of `tokens[i + 1]`.
    ///
    /// # Errors
    /// Like [`Gemma::generate`].
    pub fn score(&self, tokens: &[u32]) -> Result<Vec<Token>> {
        if tokens.len() == 1 {
            self.check_tokens(tokens)?;
            return Ok(Vec::new());
        }
        let completion = self.start_scoring(tokens)?.finish()?;
        Ok(completion.prompt_logprobs.unwrap_or_default())
    }

    /// `tokens` are at least two.
    pub(crate) fn start_scoring(&self, tokens: &[u32]) -> Result<Generation> {
        let request = Request::new(tokens.to_vec()).prompt_logprobs(0);
        request.validate()?;
        self.check_tokens(tokens)?;
        self.check_length(tokens.len(), 0)?;
        self.shared.worker.submit(Plan {
            prompt: tokens.to_vec(),
            max_new_tokens: 0,
            stop_tokens: Vec::new(),
            sampling: SamplingConfig::default(),
            logprobs: None,
            prompt_logprobs: Some(0),
            text: TextStream::new(None, Vec::new(), 0),
        })
    }

    /// The beginning-of-sequence token; `None` if the checkpoint does not name one.
    pub fn bos_token(&self) -> Option<u32> {
        self.shared.generation_config.bos_token_id
    }

    /// The token ids the model would see for this prompt.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], or [`Error::InvalidArgument`] for a token that is not in the model's vocabulary.
    pub fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let tokens = match prompt {
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Text(text) => self.required_tokenizer()?.encode(text, true)?,
            Prompt::Chat(messages) => {
                let template = self.shared.chat_template.as_ref().ok_or_else(|| {
                    Error::Tokenizer("the checkpoint has no chat template; use an instruction-tuned model".into())
                })?;
                // The template writes the beginning-of-sequence token itself.
                self.required_tokenizer()?.encode(&template.render(messages, true)?, false)?
            }
        };
        if tokens.is_empty() {
            return Err(Error::InvalidArgument("the prompt is empty; it needs at least one token".into()));
        }
        self.check_tokens(&tokens)?;
        Ok(tokens)
    }

    /// `None` if the checkpoint has no `tokenizer.json`; then only [`Prompt::Tokens`] can be used.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.shared.tokenizer.as_ref()
    }

    /// `None` if the model was not tuned for conversations.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.shared.chat_template.as_ref()
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    /// One line: backend, instruction set or GPU, threads.
    pub fn device(&self) -> &str {
        &self.shared.device
    }

    /// Tokens that one request can have, prompt and generated together: the model's context, or the KV cache if that
    /// is smaller.
    pub fn context(&self) -> usize {
        (self.shared.spec.max_positions as usize).min(self.shared.limits.cache_tokens())
    }

    /// Requests computed at once.
    pub fn max_sequences(&self) -> usize {
        self.shared.limits.max_sequences
    }

    /// How busy the model is, between two steps.
    ///
    /// # Errors
    /// [`Error::Engine`] if the worker has failed.
    pub fn usage(&self) -> Result<Usage> {
        self.shared.worker.usage()
    }

    /// What the engine has done since the model was loaded, between two steps.
    ///
    /// # Errors
    /// [`Error::Engine`] if the worker has failed.
    pub fn statistics(&self) -> Result<EngineStatistics> {
        self.shared.worker.statistics()
    }

    /// Bytes read and written in a second by a copy within the device's memory, measured now: the ceiling of whatever
    /// is bound by memory. Requests wait meanwhile, some tenths of a second.
    ///
    /// # Errors
    /// [`Error::Device`] if too little memory is free, [`Error::Engine`] if the worker has failed.
    pub fn copy_bandwidth(&self) -> Result<f64> {
        self.shared.worker.copy_bandwidth()
    }

    fn plan(&self, request: Request) -> Result<Plan> {
        let Shared { spec, generation_config, stop_tokens, tokenizer, .. } = &*self.shared;
        request.validate()?;
        let mut sampling = request.sampling.resolve(generation_config, spec.vocab_size)?;
        if let Some(&token) = request.stop_tokens.iter().find(|&&token| token >= spec.vocab_size) {
            return Err(not_in_vocabulary("stop token", token, spec));
        }
        if !request.stop.is_empty() {
            self.required_tokenizer()?;
        }
        let prompt = self.tokenize(&request.prompt)?;
        let default = DEFAULT_MAX_NEW_TOKENS.min(self.context().saturating_sub(prompt.len()));
        let max_new_tokens = request.max_new_tokens.unwrap_or(default.max(request.min_new_tokens).max(1));
        self.check_length(prompt.len(), max_new_tokens)?;

        let mut stops = request.stop_tokens;
        if !request.ignore_eos {
            stops.extend(stop_tokens);
        }
        stops.sort_unstable();
        stops.dedup();
        sampling.stop_tokens = stops.clone();
        sampling.min_new_tokens = request.min_new_tokens as u32; // at most max_new_tokens, which fits the context
        sampling.top_logprobs = request.logprobs.max(request.prompt_logprobs).unwrap_or(0).min(spec.vocab_size);
        let decoder = tokenizer.as_ref().map(|tokenizer| tokenizer.incremental_decoder());
        Ok(Plan {
            prompt,
            max_new_tokens,
            stop_tokens: stops,
            sampling,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            text: TextStream::new(decoder, request.stop, request.min_new_tokens),
        })
    }

    fn required_tokenizer(&self) -> Result<&Tokenizer> {
        self.shared.tokenizer.as_ref().ok_or_else(|| {
            Error::Tokenizer("the checkpoint has no tokenizer.json, so text cannot be used; give token ids".into())
        })
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token >= self.shared.spec.vocab_size) {
            Some(&token) => Err(not_in_vocabulary("prompt token", token, &self.shared.spec)),
            None => Ok(()),
        }
    }

    fn check_length(&self, prompt: usize, max_new_tokens: usize) -> Result<()> {
        let wanted = prompt.saturating_add(max_new_tokens);
        let what = || match max_new_tokens {
            0 => format!("the sequence has {prompt} tokens"),
            new => format!("the prompt has {prompt} tokens and {new} are to be generated"),
        };
        let (context, cache) = (self.shared.spec.max_positions as usize, self.shared.limits.cache_tokens());
        if wanted > context {
            return Err(Error::TooLong(format!("{}, but the model's context is {context} tokens", what())));
        }
        if wanted > cache {
            let Limits { pages, page_size, .. } = self.shared.limits;
            return Err(Error::TooLong(format!(
                "{}, but the KV cache holds {cache} tokens ({pages} pages of {page_size})",
                what()
            )));
        }
        Ok(())
    }
}

impl std::fmt::Debug for Gemma {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gemma").field("device", &self.shared.device).field("limits", &self.shared.limits).finish()
    }
}

fn not_in_vocabulary(what: &str, token: u32, spec: &ModelSpec) -> Error {
    Error::InvalidArgument(format!("{what} {token} is not in the model's vocabulary, 0 to {}", spec.vocab_size - 1))
}

/// What `generation_config.json` names, and the end of a turn where the model knows turns: Gemma 1 and 2 do not name
/// it there.
fn stop_tokens(checkpoint: &Checkpoint) -> Vec<u32> {
    let mut tokens = checkpoint.generation_config().eos_token_ids.clone();
    if checkpoint.chat_template().is_some() {
        tokens.extend(checkpoint.tokenizer().and_then(|tokenizer| tokenizer.token_id("<end_of_turn>")));
    }
    tokens.retain(|&token| token < checkpoint.spec().vocab_size);
    tokens
}
