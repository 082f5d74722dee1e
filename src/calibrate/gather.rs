//! Running the model over text.

use std::path::Path;
use std::time::{Duration, Instant};

use super::statistics::Statistics;
use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, EngineOptions, SamplingConfig, StepItem};
use crate::error::{Error, Result};
use crate::load;
use crate::{KvCache, LoadOptions};

const SAVE_EVERY: Duration = Duration::from_secs(30);

/// Runs `sequences` through the model, several at once, and counts the magnitudes of its activations. What comes out does
/// not depend on how the sequences share steps, nor on their order.
///
/// With `state`, a file, what was gathered is saved there now and then and in the end, and a run that finds the file goes on
/// from it; a complete one costs nothing more. `progress` is told how many tokens of how many are done.
///
/// # Errors
/// Those of [`Gemma::load`](crate::Gemma::load); [`Error::InvalidArgument`] for a model in FP8, for no sequences, and for a
/// `state` that belongs to another model or text.
pub fn gather(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    sequences: &[Vec<u32>],
    state: Option<&Path>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Statistics> {
    if sequences.is_empty() || sequences.iter().any(Vec::is_empty) {
        return Err(Error::InvalidArgument("there is nothing to calibrate with".into()));
    }
    if checkpoint.is_quantized() {
        return Err(Error::InvalidArgument(format!(
            "{} is quantized already; calibrate the checkpoint it was made of",
            checkpoint.dir().display()
        )));
    }
    let all: u64 = sequences.iter().map(|sequence| sequence.len() as u64).sum();
    let before = resume(checkpoint, sequences, state)?;
    progress(before.tokens, all);
    if before.is_complete() {
        return Ok(before);
    }
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0) as u64;
    let room = (longest + u64::from(options.page_size)) * u64::from(options.max_sequences);
    let options = LoadOptions { kv_cache: KvCache::Tokens(room), prefix_cache: false, ..options.clone() };
    let loaded = load::load(checkpoint, &options, &mut |_| {})?;
    let (mut engine, options) = (loaded.engine, loaded.options);
    engine.start_calibration()?;

    let (mut done, mut tokens, mut saved) = (before.done, before.tokens, Instant::now());
    let gathered = |engine: &Engine, done, tokens| -> Result<Statistics> {
        Ok(Statistics { done, tokens, ..before.with(engine.calibration()?) })
    };
    for together in sequences[before.done as usize..].chunks(options.max_sequences as usize) {
        feed(&mut engine, &options, together, |more| {
            tokens += more;
            progress(tokens, all);
        })?;
        done += together.len() as u64;
        if let (Some(path), true) = (state, saved.elapsed() > SAVE_EVERY) {
            gathered(&engine, done, tokens)?.write(path)?;
            saved = Instant::now();
        }
    }
    let statistics = gathered(&engine, done, tokens)?;
    if let Some(path) = state {
        statistics.write(path)?;
    }
    Ok(statistics)
}

fn resume(checkpoint: &Checkpoint, sequences: &[Vec<u32>], state: Option<&Path>) -> Result<Statistics> {
    let fingerprint = fingerprint(checkpoint, sequences);
    let total = sequences.len() as u64;
    match state {
        Some(path) if path.exists() => {
            let found = Statistics::read(path)?;
            if (found.fingerprint, found.total) != (fingerprint, total) || found.done > total {
                return Err(Error::checkpoint(
                    path,
                    "has statistics of another model, text or window; remove it, or name another file",
                ));
            }
            Ok(found)
        }
        _ => Ok(Statistics::new(fingerprint, total)),
    }
}

/// Of what decides the statistics, as far as it can be had without reading the weights (FNV-1a).
fn fingerprint(checkpoint: &Checkpoint, sequences: &[Vec<u32>]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    add(format!("{:?}", checkpoint.spec()).as_bytes());
    for tensor in checkpoint.tensors() {
        add(tensor.name().as_bytes());
        let bytes = tensor.bytes();
        add(&bytes[..bytes.len().min(64)]);
        add(&bytes[bytes.len() - bytes.len().min(64)..]);
    }
    for sequence in sequences {
        add(&(sequence.len() as u64).to_le_bytes());
        sequence.iter().for_each(|token| add(&token.to_le_bytes()));
    }
    hash
}

/// All of these, to their ends, as many tokens a step as it takes.
fn feed(
    engine: &mut Engine,
    options: &EngineOptions,
    sequences: &[Vec<u32>],
    mut progress: impl FnMut(u64),
) -> Result<()> {
    let mut left = Vec::new();
    for sequence in sequences {
        let id = engine.add_sequence(sequence, sequence.len() as u32, &SamplingConfig::default(), false)?;
        left.push((id, sequence.len() as u32));
    }
    while !left.is_empty() {
        let mut budget = options.max_batch_tokens;
        let mut items = Vec::new();
        for (id, tokens) in &mut left {
            let now = budget.min(*tokens);
            if now == 0 {
                break;
            }
            items.push(StepItem::feed(*id, now));
            *tokens -= now;
            budget -= now;
        }
        engine.step(&items)?;
        progress(items.iter().map(|item| u64::from(item.tokens)).sum());
        for &(id, _) in left.iter().filter(|&&(_, tokens)| tokens == 0) {
            engine.remove_sequence(id)?;
        }
        left.retain(|&(_, tokens)| tokens > 0);
    }
    Ok(())
}
