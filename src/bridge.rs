//! The cxx bridge to the C++ core: the plain data that crosses, and the calls.
//!
//! Every call that can fail returns `Result`; the C++ side throws `gemma_cuda::Error`, whose text starts with its
//! kind (`out_of_pages: …`), and [`crate::Error`] takes it apart again. An engine is used by one thread at a time.
#![allow(unsafe_code)] // cxx's generated code and the one `Send` below; the rest of the crate has none but the file map

#[cxx::bridge(namespace = "gemma_cuda::bridge")]
pub(crate) mod ffi {
    /// How a matrix is kept and what it is multiplied with.
    #[derive(Debug)]
    enum Scheme {
        /// As the engine's options say.
        Plain,
        /// In E4M3 with a scale for each row; its inputs too, with one scale that calibration has found.
        Fp8Static,
        /// In E4M3 with a scale for each row; its inputs too, each token with a scale of its own.
        Fp8Dynamic,
        /// As [`Scheme::Plain`], and quantized anew for every product; its inputs as for [`Scheme::Fp8Static`]. No
        /// checkpoint is like this: it shows what is gained by keeping weights in FP8.
        Fp8Cast,
    }

    /// One decoder layer. Gemma 1, 2 and 3 differ only in these numbers.
    #[derive(Clone, Debug, PartialEq)]
    struct LayerSpec {
        /// Sliding window in tokens (a query sees itself and the `window - 1` before it); 0 for full attention.
        window: u32,
        /// RoPE base frequency.
        rope_theta: f64,
        /// Linear RoPE scaling: positions are divided by it. 1 for none.
        rope_factor: f64,
        /// Query heads.
        heads: u32,
        /// Key/value heads; divides `heads`.
        kv_heads: u32,
        /// Width of one head; even.
        head_dim: u32,
        /// Factor on query-key products.
        attention_scale: f32,
        /// Soft cap on attention scores, after the scale and before the mask; 0 for none.
        attention_soft_cap: f32,
        /// Norms after the attention and MLP blocks too (Gemma 2 and 3).
        post_norms: bool,
        /// RMS norms over head_dim on queries and keys, before RoPE (Gemma 3).
        qk_norm: bool,
        /// Of the matrix that makes queries, keys and values.
        qkv: Scheme,
        /// Of the matrix behind attention.
        attention_out: Scheme,
        /// Of the matrix that makes the MLP's gate and its other factor.
        gate_up: Scheme,
        /// Of the MLP's last matrix.
        down: Scheme,
        /// Keys and values in E4M3, with a scale for each K/V head.
        fp8_cache: bool,
    }

    /// A whole model, as data.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct ModelSpec {
        /// Rows of the embedding; valid token ids are `0..vocab_size`.
        vocab_size: u32,
        /// Width of the residual stream.
        hidden_size: u32,
        /// Width of the MLP.
        ffn_size: u32,
        /// Longest sequence, in tokens.
        max_positions: u32,
        /// Epsilon of every RMS norm.
        rms_norm_eps: f32,
        /// Soft cap on the logits; 0 for none.
        final_soft_cap: f32,
        /// Whether the output embedding is the input embedding.
        tied_embeddings: bool,
        /// Of the output embedding; with FP8 it is a matrix of its own, whether tied or not.
        lm_head: Scheme,
        /// In order from the embedding on.
        layers: Vec<LayerSpec>,
    }

    /// What `config.json` says of a model.
    struct ModelConfig {
        spec: ModelSpec,
        /// Whether it gives the vocabulary's size; a nested Gemma 3 config may leave it to the embedding's rows.
        vocab_given: bool,
    }

    /// What the model's matrices are stored as and what activations between operations are rounded to.
    #[derive(Debug)]
    enum DType {
        /// 32-bit float.
        F32,
        /// bfloat16.
        BF16,
        /// float16; only on the way in, Gemma overflows in it.
        F16,
        /// FP8: the OCP standard's E4M3 without infinities. Never without a scale.
        E4M3,
    }

    /// How to build an engine. Zero means "choose for me" where a field says so.
    #[derive(Clone, Debug)]
    struct EngineOptions {
        /// `auto`, `reference` or `cuda:N`.
        device: String,
        /// Activations and K/V: `BF16` or `F32` (accumulation is always float32).
        compute: DType,
        /// Matrices in memory: `BF16` or `F32`.
        weights: DType,
        /// Tokens in one page of the KV cache.
        page_size: u32,
        /// Pages of the KV cache.
        pages: u32,
        /// Most new tokens in one step, over all sequences.
        max_batch_tokens: u32,
        /// Most sequences alive at once.
        max_sequences: u32,
        /// Most rows of logits in one step.
        max_logit_rows: u32,
        /// Threads of the reference backend; 0 for all cores.
        threads: u32,
        /// Capture steps of up to 2048 tokens as graphs, where the device can.
        graphs: bool,
        /// Keep the pages of finished sequences and reuse them for prompts that start alike.
        prefix_cache: bool,
        /// For comparison only: steps are computed as without a ragged layout. Every sequence is filled up to the one with
        /// the most new tokens, and one that was removed keeps its rows until all are. Same tokens, more work; attention
        /// alone leaves the filling out. It counts in `max_batch_tokens`.
        padded: bool,
    }

    /// One tensor a checkpoint must hold.
    #[derive(Clone, Debug, PartialEq)]
    struct TensorSlot {
        /// Canonical name, `model.layers.0.self_attn.q_proj.weight`.
        name: String,
        /// Row-major, `[out, in]` for matrices.
        shape: Vec<u64>,
    }

    /// Bytes of the device's memory an engine with these options takes, all of it before its first step. What the
    /// driver keeps for itself (kernels, recorded graphs) comes on top, and, where more is left on a Hopper GPU, a packed
    /// copy of an output embedding in bf16: three quarters of its bytes.
    #[derive(Clone, Debug, PartialEq)]
    struct MemoryBudget {
        /// The matrices, norms and scales, as they are kept.
        weights: u64,
        /// Keys and values of all pages.
        kv_cache: u64,
        /// What lies between operations, for the largest step.
        activations: u64,
        /// Of the rows that are sampled or scored, in float32.
        logits: u64,
        /// What operations need for themselves.
        workspace: u64,
        /// Of all.
        total: u64,
    }

    /// What is added to a token's logit before anything else.
    #[derive(Clone, Debug, PartialEq)]
    struct TokenBias {
        /// Its id.
        token: u32,
        /// In logits.
        bias: f32,
    }

    /// Sampling of one sequence, resolved: every number is in range and has a value.
    #[derive(Clone, Debug)]
    struct SamplingConfig {
        /// 0 is greedy.
        temperature: f32,
        /// 0 is off.
        top_k: u32,
        /// 1 is off.
        top_p: f32,
        /// 0 is off.
        min_p: f32,
        /// 1 is off. Over prompt and generated tokens.
        repetition_penalty: f32,
        /// 0 is off. Over generated tokens.
        presence_penalty: f32,
        /// 0 is off. Over generated tokens, per occurrence.
        frequency_penalty: f32,
        /// The same seed picks the same tokens.
        seed: u64,
        /// Added before penalties; at most one a token.
        logit_bias: Vec<TokenBias>,
        /// Tokens that cannot be sampled before `min_new_tokens` others were.
        stop_tokens: Vec<u32>,
        /// Before so many, no stop token is sampled.
        min_new_tokens: u32,
        /// How many of the likeliest tokens to report beside the sampled or scored one.
        top_logprobs: u32,
    }

    /// One sequence's part in a step: feed its next `tokens` known tokens.
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct StepItem {
        /// The sequence's number.
        sequence: u32,
        /// At least 1.
        tokens: u32,
        /// Sample the next token after the last fed one, which must be the sequence's last, and append it.
        sample: bool,
        /// Log-probability of every known token that follows a fed one.
        score: bool,
        /// Return logits `[tokens, vocab_size]`.
        logits: bool,
        /// Return hidden states `[layers + 1, tokens, hidden_size]`: scaled embeddings, then each layer's output,
        /// the last one after the final norm.
        hidden: bool,
    }

    /// A token that was likely.
    #[derive(Clone, Debug, PartialEq)]
    struct TokenLogprob {
        /// Its id.
        token: u32,
        /// In nats, under the model: before bias, penalties and temperature.
        logprob: f32,
    }

    /// A token, its log-probability under the model (before penalties and temperature), and the likeliest ones.
    #[derive(Clone, Debug, PartialEq)]
    struct ScoredToken {
        /// Its id.
        token: u32,
        /// In nats.
        logprob: f32,
        /// As many as `top_logprobs` said, in order.
        top: Vec<TokenLogprob>,
    }

    /// What a step has for one of its items.
    #[derive(Clone, Debug)]
    struct ItemOutput {
        /// The sequence's number.
        sequence: u32,
        /// Empty, or the one sampled token.
        sampled: Vec<ScoredToken>,
        /// If the item asked to score: of every known token that follows a fed one.
        scored: Vec<ScoredToken>,
        /// If it asked for them: `[tokens, vocab_size]`.
        logits: Vec<f32>,
        /// If it asked for them: `[layers + 1, tokens, hidden_size]`.
        hidden: Vec<f32>,
        /// Why the sequence can only be removed: it has logits that are not finite. Empty where all is well; else
        /// nothing is sampled or scored.
        failure: String,
    }

    /// Where a sequence stands.
    #[derive(Clone, Debug, PartialEq)]
    struct SequenceState {
        /// Known tokens: prompt and generated.
        tokens: u32,
        /// Those whose keys and values are in the cache.
        cached: u32,
    }

    /// What an engine has done since it was made.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    struct EngineStatistics {
        /// Forward passes.
        steps: u64,
        /// Those that replayed a captured graph.
        captured_steps: u64,
        /// Tokens fed, of prompts and generated.
        tokens: u64,
        /// Bytes the steps had to read at least: the layers' matrices once a step, the output embedding where there are
        /// logits, and the cached keys and values that the step's tokens see.
        bytes_read: u64,
        /// Multiplications and additions of the steps' products with those matrices; attention's come on top.
        flops: u64,
        /// Bytes allocated on the device now; a driver takes some more for itself.
        memory: u64,
        /// The most there were.
        peak_memory: u64,
    }

    /// Magnitudes of the activations whose scale a tensor of this name will be.
    #[derive(Clone, Debug, PartialEq)]
    struct Observation {
        /// `model.layers.0.self_attn.q_proj.input_scale` for all three that share the input; `….self_attn.k_scale` with a
        /// group for each K/V head.
        name: String,
        /// The largest finite one of each group.
        largest: Vec<f32>,
        /// For each group 4096 bins, sixteen of them from one power of two to the next: bin `i` begins at the float32
        /// whose bits are `i << 19`. NaN and infinity are in the last sixteen.
        counts: Vec<u64>,
    }

    unsafe extern "C++" {
        include!("api/bridge.h");

        /// Of `config.json`'s text, in any form Gemma 1, 2 and 3 have been published in; how a checkpoint was quantized
        /// is not read. An error names the member at fault.
        fn parse_config(json: &str) -> Result<ModelConfig>;

        /// Rows of row-major `bytes` in E4M3: each element divided by its row's scale, or by the only one.
        fn quantize_e4m3(dtype: DType, bytes: &[u8], scales: &[f32]) -> Result<Vec<u8>>;

        /// The canonical name of a checkpoint's tensor (its prefix normalized); empty for a tensor of a vision
        /// tower, which text generation leaves aside.
        fn canonical_tensor_name(name: &str) -> String;
        /// Every tensor a checkpoint of this model holds, in a fixed order.
        fn tensor_table(spec: &ModelSpec) -> Result<Vec<TensorSlot>>;
        fn memory_budget(spec: &ModelSpec, options: &EngineOptions) -> Result<MemoryBudget>;

        type Engine;
        fn new_engine(spec: &ModelSpec, options: &EngineOptions) -> Result<UniquePtr<Engine>>;
        /// One line: backend, instruction set or GPU, threads.
        fn device_name(self: &Engine) -> String;
        fn load_tensor(self: Pin<&mut Engine>, name: &str, dtype: DType, shape: &[u64], bytes: &[u8]) -> Result<()>;
        /// Random weights instead.
        fn load_random(self: Pin<&mut Engine>, seed: u64) -> Result<()>;
        /// After the last tensor: an error names what is missing.
        fn finish_loading(self: Pin<&mut Engine>) -> Result<()>;

        /// Starts a sequence of known tokens, of which the first `prompt_tokens` are the prompt and the rest count as
        /// generated. With `reuse_prefix`, whole pages another sequence left behind are taken over.
        fn add_sequence(
            self: Pin<&mut Engine>,
            tokens: &[u32],
            prompt_tokens: u32,
            sampling: &SamplingConfig,
            reuse_prefix: bool,
        ) -> Result<u32>;
        fn append_tokens(self: Pin<&mut Engine>, sequence: u32, tokens: &[u32]) -> Result<()>;
        fn remove_sequence(self: Pin<&mut Engine>, sequence: u32) -> Result<()>;
        fn sequence_state(self: &Engine, sequence: u32) -> Result<SequenceState>;

        /// Pages that can be had now, those kept only for reuse included.
        fn free_pages(self: &Engine) -> u32;
        /// Pages a sequence must take from the free ones to feed its next `tokens` tokens.
        fn pages_for(self: &Engine, sequence: u32, tokens: u32) -> Result<u32>;

        /// One forward pass over any mix of prefill chunks and decode rows. On error nothing has changed.
        fn step(self: Pin<&mut Engine>, items: &[StepItem]) -> Result<Vec<ItemOutput>>;
        /// The first half of a step: returns once it is on its way. At most two may be, and not collected.
        fn launch(self: Pin<&mut Engine>, items: &[StepItem]) -> Result<()>;
        /// The second half, of the oldest step that is on its way.
        fn collect(self: Pin<&mut Engine>) -> Result<Vec<ItemOutput>>;
        fn runs_ahead(self: &Engine) -> bool;

        fn start_calibration(self: Pin<&mut Engine>) -> Result<()>;
        fn calibration(self: &Engine) -> Result<Vec<Observation>>;

        fn statistics(self: &Engine) -> EngineStatistics;
        /// Bytes read and written in a second by a copy within the device's memory, measured now.
        fn copy_bandwidth(self: Pin<&mut Engine>) -> Result<f64>;
    }
}

// SAFETY: an engine owns all it points to and keeps no thread-local state; cxx hands out `&mut` for every call that
// changes it, so moving it to another thread is sound. It is not `Sync`.
unsafe impl Send for ffi::Engine {}
