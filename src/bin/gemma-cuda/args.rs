//! Options that several commands share.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, Args};
use gemma_cuda::{ComputeType, Gemma, KvCache, LoadOptions, SamplingParams};

use crate::exit::bad_input;
use crate::progress;

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Folder of the checkpoint
    #[arg(long, short, value_name = "DIR")]
    pub model: PathBuf,

    /// Where to run: auto (the first usable GPU, or the CPU), reference (the CPU) or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,

    /// Compute in bf16 or f32; fp16 is refused, Gemma overflows in it
    #[arg(long, default_value = "bf16", value_name = "TYPE")]
    pub dtype: ComputeType,

    /// Room for keys and values: tokens (8192) or bytes (512MiB, 4GiB) [default: four contexts of up to 8192 tokens,
    /// at most 2GiB]
    #[arg(long, value_name = "SIZE", value_parser = kv_cache)]
    pub kv_cache: Option<KvCache>,

    /// Tokens in one page of the KV cache
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    pub page_size: u32,

    /// Most new tokens in one step, over all prompts
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub max_batch_tokens: u32,

    /// Most prompts computed at once
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub max_sequences: u32,

    /// Threads of the CPU backend; 0 for all cores
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: u32,

    /// Do not capture steps as CUDA graphs
    #[arg(long)]
    pub no_graphs: bool,
    /// Do not reuse keys and values of earlier prompts
    #[arg(long)]
    pub no_prefix_cache: bool,

    /// Refuse a checkpoint that holds a NaN or an infinity
    #[arg(long, visible_alias = "check")]
    pub check_weights: bool,
}

impl ModelArgs {
    pub fn options(&self) -> LoadOptions {
        LoadOptions {
            device: self.device.clone(),
            compute: self.dtype,
            kv_cache: self.kv_cache.unwrap_or_default(),
            page_size: self.page_size,
            max_batch_tokens: self.max_batch_tokens,
            max_sequences: self.max_sequences,
            max_logit_rows: LoadOptions::default().max_logit_rows,
            threads: self.threads,
            graphs: !self.no_graphs,
            prefix_cache: !self.no_prefix_cache,
            check_weights: self.check_weights,
            ..Default::default()
        }
    }

    /// For work that looks at the logits of whole texts.
    pub fn scoring_options(&self) -> LoadOptions {
        LoadOptions { max_logit_rows: 256.min(self.max_batch_tokens), ..self.options() }
    }

    pub fn load(&self, options: LoadOptions) -> Result<Gemma> {
        let bar = progress::loading();
        let model = Gemma::load_with_progress(&self.model, options, |loaded| progress::show(&bar, loaded));
        bar.finish_and_clear();
        Ok(model?)
    }
}

/// `8192` is tokens, `512MiB` and `4GiB` are bytes.
fn kv_cache(text: &str) -> Result<KvCache, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let wrong = || format!("{text:?} is neither a number of tokens nor bytes in KiB, MiB or GiB");
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let bytes = |shift: u32| number.checked_mul(1 << shift).map(KvCache::Bytes).ok_or_else(wrong);
    match unit {
        "" => Ok(KvCache::Tokens(number)),
        "KiB" => bytes(10),
        "MiB" => bytes(20),
        "GiB" => bytes(30),
        _ => Err(wrong()),
    }
}

/// What is not given is as the checkpoint's generation_config.json has it.
#[derive(Args)]
#[command(next_help_heading = "Sampling (what is not given is as in the checkpoint's generation_config.json)")]
pub struct SamplingArgs {
    /// Always take the likeliest token; short for --temperature 0
    #[arg(long, conflicts_with = "temperature")]
    pub greedy: bool,

    /// 0 is greedy, 1 the model's own distribution, more is wilder
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    pub temperature: Option<f32>,

    /// Keep only the K likeliest tokens; 0 is off
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,

    /// Keep the likeliest tokens that together reach this probability; 1 is off
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    pub top_p: Option<f32>,

    /// Drop tokens less likely than this share of the likeliest; 0 is off
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    pub min_p: Option<f32>,

    /// Make every token seen so far less likely; 1 is off
    #[arg(long, allow_negative_numbers = true, value_name = "R")]
    pub repetition_penalty: Option<f32>,

    /// Subtract from the logits of tokens generated so far; 0 is off
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    pub presence_penalty: Option<f32>,

    /// Subtract once for each time a token was generated; 0 is off
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    pub frequency_penalty: Option<f32>,

    /// The same seed gives the same text; without one, a seed is drawn (--json reports it)
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Add BIAS to the logit of TOKEN; may be repeated
    #[arg(long, action = ArgAction::Append, value_parser = logit_bias, value_name = "TOKEN=BIAS")]
    pub logit_bias: Vec<(u32, f32)>,
}

impl SamplingArgs {
    pub fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: if self.greedy { Some(0.0) } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            logit_bias: self.logit_bias.clone(),
        }
    }
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(token, bias)| Some((token.parse().ok()?, bias.parse().ok()?)));
    parsed.ok_or_else(|| format!("{text:?} is not TOKEN=BIAS, such as 42=-1.5"))
}

/// `2,5,9`
pub fn token_ids(text: &str) -> Result<Vec<u32>> {
    let parse = |id: &str| {
        id.trim().parse().map_err(|_| bad_input(format!("--prompt-ids: {id:?} is no token id; write them as 2,5,9")))
    };
    if text.trim().is_empty() { Ok(Vec::new()) } else { text.split(',').map(parse).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_cache() {
        assert_eq!(kv_cache("8192"), Ok(KvCache::Tokens(8192)));
        assert_eq!(kv_cache("512MiB"), Ok(KvCache::Bytes(512 << 20)));
        assert_eq!(kv_cache("4GiB"), Ok(KvCache::Bytes(4 << 30)));
        for wrong in ["", "GiB", "-1", "1GB", "99999999999999999999", "18446744073709551615GiB", "1.5GiB", "é"] {
            assert!(kv_cache(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lists_of_tokens() {
        assert_eq!(token_ids("2, 5,9").unwrap(), [2, 5, 9]);
        assert!(token_ids("").unwrap().is_empty());
        assert!(token_ids("2,,5").is_err());
        assert!(token_ids("2,-5").is_err());
    }

    #[test]
    fn biases() {
        assert_eq!(logit_bias("42=-1.5"), Ok((42, -1.5)));
        for wrong in ["42", "=1", "x=1", "1=y"] {
            assert!(logit_bias(wrong).is_err(), "{wrong}");
        }
    }
}
