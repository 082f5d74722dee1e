//! How a model is put on a device.

use std::str::FromStr;

use serde::Serialize;

use crate::engine::{DType, EngineOptions, ModelSpec, memory_budget};
use crate::{Error, Result};

/// What activations, keys and values are rounded to. Sums are always float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// bfloat16, what Gemma was trained in.
    #[default]
    Bf16,
    /// float32, for comparing against references; matrices that the checkpoint stores as bfloat16 stay so, exactly.
    F32,
}

impl FromStr for ComputeType {
    type Err = Error;

    /// `bf16` or `f32` (or their long names).
    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "bf16" | "bfloat16" => Ok(ComputeType::Bf16),
            "f32" | "fp32" | "float32" => Ok(ComputeType::F32),
            "f16" | "fp16" | "float16" | "half" => Err(Error::InvalidArgument(format!(
                "cannot compute in {name}: Gemma's activations overflow float16; use bf16 or f32 (a checkpoint stored as \
                 float16 loads in either)"
            ))),
            _ => Err(Error::InvalidArgument(format!("unknown compute type {name:?}; use bf16 or f32"))),
        }
    }
}

/// Room for the keys and values of all sequences together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvCache {
    /// Four sequences of the model's context (of 8192 tokens at most), but no more than 2 GiB.
    #[default]
    Auto,
    /// So many tokens, rounded up to whole pages.
    Tokens(u64),
    /// As many whole pages as these bytes hold.
    Bytes(u64),
}

/// How to load a model. The defaults suit one GPU or one machine that serves a few callers.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOptions {
    /// `auto` (the first usable GPU, or the reference backend), `reference` (the CPU) or `cuda:N`.
    pub device: String,
    /// What activations are rounded to.
    pub compute: ComputeType,
    /// Room for keys and values.
    pub kv_cache: KvCache,
    /// Tokens in one page of the KV cache; 1 to 4096. Smaller pages share more of a prompt and waste less at its end.
    pub page_size: u32,
    /// New tokens in one step, over all sequences; at least `max_sequences`. More makes long prompts faster and the
    /// steps of others beside them slower.
    pub max_batch_tokens: u32,
    /// Requests computed at once; more wait in a queue. At least 1.
    pub max_sequences: u32,
    /// Positions in one step whose logits are computed: one for each request that generates, and each token of a prompt
    /// whose log-probabilities are asked for. Raised to `max_sequences` where it is less. A row takes 4 bytes for each
    /// token of the vocabulary.
    pub max_logit_rows: u32,
    /// Threads of the reference backend; 0 for all cores.
    pub threads: u32,
    /// Capture steps of up to 2048 tokens as CUDA graphs. Without them each step costs some tenths of a millisecond more.
    pub graphs: bool,
    /// Keep the keys and values of finished requests as long as there is room, for prompts that start alike.
    pub prefix_cache: bool,
    /// For comparison only: compute steps as without a ragged layout, every request filled up to the one with the most new
    /// tokens, and the rows of one that has ended kept until all have. A step then takes at most `max_batch_tokens /
    /// max_sequences` tokens of a request. Gives the same tokens, more slowly.
    pub padded: bool,
    /// Refuse a checkpoint that holds a NaN or an infinity. Reads every weight once more.
    pub check_weights: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            device: "auto".into(),
            compute: ComputeType::default(),
            kv_cache: KvCache::default(),
            page_size: 32,
            max_batch_tokens: 512,
            max_sequences: 32,
            max_logit_rows: 64,
            threads: 0,
            graphs: true,
            prefix_cache: true,
            padded: false,
            check_weights: false,
        }
    }
}

const AUTO_SEQUENCES: u64 = 4;
const AUTO_CONTEXT: u32 = 8192;
const AUTO_BYTES: u64 = 2 << 30;

impl LoadOptions {
    /// The engine's options for this model. `exact_in_bf16`: every stored weight is a bfloat16 number.
    pub(crate) fn resolve(&self, spec: &ModelSpec, exact_in_bf16: bool) -> Result<EngineOptions> {
        self.validate()?;
        let compute = match self.compute {
            ComputeType::Bf16 => DType::BF16,
            ComputeType::F32 => DType::F32,
        };
        let weights = if exact_in_bf16 { DType::BF16 } else { compute };
        let mut options = EngineOptions {
            device: self.device.clone(),
            compute,
            weights,
            page_size: self.page_size,
            pages: 1,
            max_batch_tokens: self.max_batch_tokens,
            max_sequences: self.max_sequences,
            max_logit_rows: self.max_logit_rows.max(self.max_sequences),
            threads: self.threads,
            graphs: self.graphs,
            prefix_cache: self.prefix_cache,
            padded: self.padded,
        };
        let page_bytes = memory_budget(spec, &options)?.kv_cache.max(1);
        let page_tokens = u64::from(self.page_size);
        let pages = match self.kv_cache {
            KvCache::Auto => {
                let tokens = AUTO_SEQUENCES * u64::from(spec.max_positions.min(AUTO_CONTEXT));
                tokens.div_ceil(page_tokens).min(AUTO_BYTES / page_bytes).max(1)
            }
            KvCache::Tokens(tokens) => tokens.div_ceil(page_tokens),
            KvCache::Bytes(bytes) => bytes / page_bytes,
        };
        if pages == 0 {
            return Err(Error::InvalidArgument(format!(
                "the KV cache asked for ({:?}) holds no page; one page of {page_tokens} tokens takes {}",
                self.kv_cache,
                bytes_text(page_bytes)
            )));
        }
        options.pages = u32::try_from(pages).map_err(|_| {
            Error::InvalidArgument(format!("the KV cache asked for ({:?}) has {pages} pages; too many", self.kv_cache))
        })?;
        Ok(options)
    }

    fn validate(&self) -> Result<()> {
        let in_range = |name: &str, value: u32, low: u32, high: u32| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::InvalidArgument(format!("{name} is {value}; it must be between {low} and {high}")))
        };
        in_range("page_size", self.page_size, 1, 4096)?;
        in_range("max_sequences", self.max_sequences, 1, 4096)?;
        in_range("max_batch_tokens", self.max_batch_tokens, self.max_sequences, 1 << 20)?;
        in_range("threads", self.threads, 0, 4096)
    }
}

/// `1.5 GiB`, `640 KiB`, `12 bytes`.
pub(crate) fn bytes_text(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|&(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / f64::from(1u32 << shift)),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compute_types_parse_and_float16_is_refused_with_its_reason() {
        assert_eq!("bf16".parse::<ComputeType>().unwrap(), ComputeType::Bf16);
        assert_eq!("Float32".parse::<ComputeType>().unwrap(), ComputeType::F32);
        for name in ["fp16", "f16", "float16", "half"] {
            assert!(name.parse::<ComputeType>().unwrap_err().to_string().contains("overflow float16"));
        }
        assert!("int8".parse::<ComputeType>().unwrap_err().to_string().contains("int8"));
    }

    #[test]
    fn limits_that_would_starve_a_sequence_are_refused() {
        let options = LoadOptions { max_batch_tokens: 3, max_sequences: 4, ..Default::default() };
        assert!(options.validate().unwrap_err().to_string().contains("max_batch_tokens is 3"));
        assert!(LoadOptions { page_size: 0, ..Default::default() }.validate().is_err());
        assert!(LoadOptions { max_sequences: 0, ..Default::default() }.validate().is_err());
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(bytes_text(3 << 29), "1.5 GiB");
        assert_eq!(bytes_text(640 << 10), "640.0 KiB");
        assert_eq!(bytes_text(12), "12 bytes");
    }
}
