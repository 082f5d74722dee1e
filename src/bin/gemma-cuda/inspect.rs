//! `gemma-cuda inspect`

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use gemma_cuda::checkpoint::Checkpoint;
use gemma_cuda::engine::{EngineOptions, LayerSpec, MemoryBudget, Scheme};
use serde::Serialize;

use crate::args::ModelArgs;
use crate::exit::Outcome;
use crate::output;

#[derive(clap::Args)]
#[command(after_help = "\
Memory is what a run with these model options would take.

Examples:
  gemma-cuda inspect -m gemma-3-1b-it
  gemma-cuda inspect -m gemma-3-1b-it --kv-cache 32768 --json
  gemma-cuda inspect -m damaged --check")]
pub struct Args {
    /// Write one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Serialize)]
struct Summary {
    vocab_size: u32,
    hidden_size: u32,
    ffn_size: u32,
    max_positions: u32,
    tied_embeddings: bool,
    final_soft_cap: f32,
    tensors: usize,
    parameters: u64,
    /// Bytes in the files, by type.
    stored_bytes: BTreeMap<String, u64>,
    tokenizer: bool,
    chat_template: bool,
    eos_token_ids: Vec<u32>,
    layers: Vec<Layers>,
    memory: Memory,
    /// Whether every weight was found finite; absent without --check.
    #[serde(skip_serializing_if = "Option::is_none")]
    finite: Option<bool>,
}

/// Layers that are alike.
#[derive(Serialize)]
struct Layers {
    layers: Vec<usize>,
    /// 0: full attention.
    window: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rope_theta: f64,
    rope_factor: f64,
    attention_scale: f32,
    attention_soft_cap: f32,
    post_norms: bool,
    qk_norm: bool,
    /// What is in FP8: matrices with how their inputs are scaled, and `cache` for keys and values.
    fp8: Vec<String>,
}

/// Bytes.
#[derive(Serialize)]
struct Memory {
    weights: u64,
    kv_cache: u64,
    kv_cache_tokens: u64,
    activations: u64,
    logits: u64,
    workspace: u64,
    total: u64,
}

pub fn run(args: Args) -> Result<Outcome> {
    let checkpoint = Checkpoint::open(&args.model.model)?;
    let (options, budget) = args.model.options().plan(&checkpoint)?;
    let check = args.model.check_weights;
    if check {
        checkpoint.check_weights()?;
    }
    let summary = summarize(&checkpoint, &options, &budget, check);
    if args.json {
        output::json(&summary)?
    } else {
        output::text(&table(&summary)?)?
    }
    Ok(Outcome::Done)
}

fn summarize(checkpoint: &Checkpoint, options: &EngineOptions, budget: &MemoryBudget, checked: bool) -> Summary {
    let spec = checkpoint.spec();
    let mut stored_bytes = BTreeMap::new();
    let (mut tensors, mut parameters) = (0, 0);
    for tensor in checkpoint.tensors() {
        tensors += 1;
        if !tensor.is_scale() {
            parameters += tensor.shape().iter().product::<u64>();
        }
        *stored_bytes.entry(format!("{:?}", tensor.dtype()).to_lowercase()).or_default() += tensor.bytes().len() as u64;
    }
    Summary {
        vocab_size: spec.vocab_size,
        hidden_size: spec.hidden_size,
        ffn_size: spec.ffn_size,
        max_positions: spec.max_positions,
        tied_embeddings: spec.tied_embeddings,
        final_soft_cap: spec.final_soft_cap,
        tensors,
        parameters,
        stored_bytes,
        tokenizer: checkpoint.tokenizer().is_some(),
        chat_template: checkpoint.chat_template().is_some(),
        eos_token_ids: checkpoint.generation_config().eos_token_ids.clone(),
        layers: group(&spec.layers),
        memory: Memory {
            weights: budget.weights,
            kv_cache: budget.kv_cache,
            kv_cache_tokens: u64::from(options.pages) * u64::from(options.page_size),
            activations: budget.activations,
            logits: budget.logits,
            workspace: budget.workspace,
            total: budget.total,
        },
        finite: checked.then_some(true),
    }
}

/// In the order in which each kind first appears.
fn group(layers: &[LayerSpec]) -> Vec<Layers> {
    let mut kinds: Vec<(&LayerSpec, Vec<usize>)> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        match kinds.iter_mut().find(|(kind, _)| *kind == layer) {
            Some((_, indices)) => indices.push(index),
            None => kinds.push((layer, vec![index])),
        }
    }
    let summary = |(kind, layers): (&LayerSpec, Vec<usize>)| Layers {
        layers,
        window: kind.window,
        heads: kind.heads,
        kv_heads: kind.kv_heads,
        head_dim: kind.head_dim,
        rope_theta: kind.rope_theta,
        rope_factor: kind.rope_factor,
        attention_scale: kind.attention_scale,
        attention_soft_cap: kind.attention_soft_cap,
        post_norms: kind.post_norms,
        qk_norm: kind.qk_norm,
        fp8: fp8(kind),
    };
    kinds.into_iter().map(summary).collect()
}

fn fp8(layer: &LayerSpec) -> Vec<String> {
    let matrices =
        [("qkv", layer.qkv), ("attention_out", layer.attention_out), ("gate_up", layer.gate_up), ("down", layer.down)];
    let named = matrices.iter().filter_map(|(name, scheme)| Some(format!("{name} {}", inputs(*scheme)?)));
    named.chain(layer.fp8_cache.then(|| "cache".to_owned())).collect()
}

/// How the inputs of an FP8 matrix are scaled.
fn inputs(scheme: Scheme) -> Option<&'static str> {
    match scheme {
        Scheme::Fp8Static => Some("static"),
        Scheme::Fp8Dynamic => Some("dynamic"),
        _ => None,
    }
}

fn table(s: &Summary) -> Result<String> {
    let mut out = String::new();
    let stored: Vec<String> = s.stored_bytes.iter().map(|(dtype, bytes)| format!("{} {dtype}", size(*bytes))).collect();
    writeln!(out, "parameters   {} in {} tensors ({})", s.parameters, s.tensors, stored.join(", "))?;
    writeln!(out, "vocabulary   {}", s.vocab_size)?;
    writeln!(out, "hidden, ffn  {}, {}", s.hidden_size, s.ffn_size)?;
    writeln!(out, "context      {} tokens", s.max_positions)?;
    writeln!(
        out,
        "output       {}, {}",
        if s.tied_embeddings { "tied to the embedding" } else { "its own matrix" },
        cap(s.final_soft_cap)
    )?;
    writeln!(
        out,
        "text         tokenizer {}, chat template {}, ends at {:?}",
        yes(s.tokenizer),
        yes(s.chat_template),
        s.eos_token_ids
    )?;
    writeln!(out, "layers       {}", s.layers.iter().map(|kind| kind.layers.len()).sum::<usize>())?;
    for kind in &s.layers {
        let window = if kind.window == 0 { "full attention".into() } else { format!("window {}", kind.window) };
        let norms = match (kind.post_norms, kind.qk_norm) {
            (false, false) => "norms before blocks",
            (true, false) => "norms around blocks",
            (false, true) => "norms before blocks and on q, k",
            (true, true) => "norms around blocks and on q, k",
        };
        writeln!(
            out,
            "  {:>3} x {window}: heads {}/{} of {}, rope {} / {}, scale {:.6}, {}, {norms}{}",
            kind.layers.len(),
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            kind.rope_theta,
            kind.rope_factor,
            kind.attention_scale,
            cap(kind.attention_soft_cap),
            if kind.fp8.is_empty() { String::new() } else { format!(", FP8: {}", kind.fp8.join(", ")) },
        )?;
    }
    let m = &s.memory;
    writeln!(
        out,
        "memory       {}: weights {}, KV cache {} ({} tokens), activations {}, logits {}, workspace {}",
        size(m.total),
        size(m.weights),
        size(m.kv_cache),
        m.kv_cache_tokens,
        size(m.activations),
        size(m.logits),
        size(m.workspace),
    )?;
    if s.finite == Some(true) {
        writeln!(out, "weights      all finite")?;
    }
    Ok(out)
}

fn yes(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

fn cap(cap: f32) -> String {
    if cap == 0.0 { "no soft cap".into() } else { format!("soft cap {cap}") }
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
