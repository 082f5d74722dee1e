//! `generation_config.json`: what the model's makers sample with, and the tokens that end a text.

use std::path::Path;

use serde_json::Map;

use super::config::Config;
use super::fields::{Fields, read_object};
use crate::error::Result;

/// Defaults for generation. What the file leaves out is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Whether to sample at all; greedy otherwise.
    pub do_sample: bool,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// So many of the likeliest tokens; 0 is all.
    pub top_k: Option<u32>,
    /// The likeliest tokens that make so much of the probability, 0 to 1.
    pub top_p: Option<f32>,
    /// Tokens that are so likely, compared with the likeliest one, 0 to 1.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that have been there, if above 1.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
}

impl GenerationConfig {
    /// The file may be absent; `config.json` names the special tokens then.
    pub(super) fn read(dir: &Path, config: &Config) -> Result<Self> {
        let path = dir.join("generation_config.json");
        let map = if path.exists() { read_object(&path)? } else { Map::new() };
        let fields = Fields::new(&path, &map);
        let number = |name| Ok::<_, crate::Error>(fields.number(name)?.map(|number| number as f32));
        let mut out = GenerationConfig {
            do_sample: fields.boolean("do_sample")?.unwrap_or(false),
            temperature: number("temperature")?,
            top_k: fields.count("top_k")?,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied().or(config.bos_token_id),
        };
        if out.eos_token_ids.is_empty() {
            out.eos_token_ids.clone_from(&config.eos_token_ids);
        }
        Ok(out)
    }
}
