//! Models against a baseline on the same text, token by token.

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, SamplingConfig, StepItem};
use crate::load;
use crate::verify::LogitStats;
use crate::{Error, KvCache, LoadOptions, Result};

/// How well a model predicts a text, and how far its distributions are from the baseline's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Kullback-Leibler divergence from the baseline's distribution, in nats: the mean over all tokens.
    pub mean_kl: f64,
    /// The largest.
    pub max_kl: f64,
    /// Share of tokens for which the likeliest one is the baseline's, 0 to 1.
    pub top1: f64,
}

/// One model on its way through the text.
struct Model {
    engine: Engine,
    at_once: usize,
    nll: f64,
    stats: LogitStats,
}

/// Runs `baseline` and `candidates` side by side over `tokens`, which do not begin with `bos`: in windows as
/// [`perplexity`](super::perplexity) has them, each token predicted once. The baseline comes first in what is returned, with
/// no distance from itself. `progress` is told how many tokens of how many are done.
///
/// # Errors
/// [`Error::InvalidArgument`] for a window out of range, no tokens, or a model with another vocabulary; the errors of
/// loading and running each.
pub fn compare(
    baseline: &Checkpoint,
    candidates: &[Checkpoint],
    options: &LoadOptions,
    bos: u32,
    tokens: &[u32],
    window: usize,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<Quality>> {
    let spec = baseline.spec();
    if !(2..=spec.max_positions as usize).contains(&window) {
        return Err(Error::InvalidArgument(format!(
            "the window is {window} tokens; it must be between 2 and {}, the model's context",
            spec.max_positions
        )));
    }
    if tokens.is_empty() {
        return Err(Error::InvalidArgument("the text is empty; there is nothing to predict".into()));
    }
    if let Some(other) = candidates.iter().find(|other| other.spec().vocab_size != spec.vocab_size) {
        return Err(Error::InvalidArgument(format!(
            "{} has {} tokens in its vocabulary, the baseline {}",
            other.dir().display(),
            other.spec().vocab_size,
            spec.vocab_size
        )));
    }
    let options = LoadOptions { kv_cache: KvCache::Tokens(window as u64), prefix_cache: false, ..options.clone() };
    let load = |checkpoint: &Checkpoint| -> Result<Model> {
        let loaded = load::load(checkpoint, &options, &mut |_| {})?;
        let at_once = loaded.options.max_batch_tokens.min(loaded.options.max_logit_rows) as usize;
        Ok(Model { engine: loaded.engine, at_once, nll: 0.0, stats: LogitStats::default() })
    };
    let mut models = std::iter::once(baseline).chain(candidates).map(load).collect::<Result<Vec<_>>>()?;
    let mut done = 0;
    for chunk in tokens.chunks(window - 1) {
        let sequence: Vec<u32> = std::iter::once(bos).chain(chunk.iter().copied()).collect();
        run_window(&mut models, &sequence, spec.vocab_size as usize, |more| {
            done += more;
            progress(done, tokens.len());
        })?;
    }
    models.iter().map(|model| model.quality(tokens.len())).collect()
}

/// All models over one window, the last token of which is only predicted.
fn run_window(models: &mut [Model], sequence: &[u32], vocab: usize, mut progress: impl FnMut(usize)) -> Result<()> {
    let at_once = models.iter().map(|model| model.at_once).min().unwrap_or(1);
    let mut ids = Vec::new();
    for model in models.iter_mut() {
        ids.push(model.engine.add_sequence(sequence, sequence.len() as u32, &SamplingConfig::default(), false)?);
    }
    let mut next = &sequence[1..];
    while !next.is_empty() {
        let (now, rest) = next.split_at(next.len().min(at_once));
        let mut golden = Vec::new();
        for (model, &id) in models.iter_mut().zip(&ids) {
            let item = StepItem { logits: true, ..StepItem::feed(id, now.len() as u32) };
            let mut output = model.engine.step(&[item])?.remove(0);
            if !output.failure.is_empty() {
                return Err(Error::Engine(output.failure));
            }
            if golden.is_empty() {
                golden = std::mem::take(&mut output.logits);
                model.add(&golden, &golden, now, vocab);
            } else {
                model.add(&golden, &output.logits, now, vocab);
            }
        }
        progress(now.len());
        next = rest;
    }
    for (model, id) in models.iter_mut().zip(ids) {
        model.engine.remove_sequence(id)?;
    }
    Ok(())
}

impl Model {
    /// Rows of logits, each for one of the tokens that came next.
    fn add(&mut self, golden: &[f32], ours: &[f32], next: &[u32], vocab: usize) {
        let rows: Vec<(&[f32], &[f32], u32)> = golden
            .chunks_exact(vocab)
            .zip(ours.chunks_exact(vocab))
            .zip(next)
            .map(|((golden, ours), &token)| (golden, ours, token))
            .collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let part = |rows: &[(&[f32], &[f32], u32)]| {
            let (mut nll, mut stats) = (0.0, LogitStats::default());
            for (golden, ours, token) in rows {
                nll += negative_log_likelihood(ours, *token);
                stats.add_row(golden, ours);
            }
            (nll, stats)
        };
        let parts: Vec<(f64, LogitStats)> = std::thread::scope(|scope| {
            let running: Vec<_> =
                rows.chunks(rows.len().div_ceil(threads).max(1)).map(|rows| scope.spawn(move || part(rows))).collect();
            let join = |part: std::thread::ScopedJoinHandle<_>| {
                part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(join).collect()
        });
        for (nll, stats) in parts {
            self.nll += nll;
            self.stats.merge(&stats);
        }
    }

    fn quality(&self, tokens: usize) -> Result<Quality> {
        let error = self.stats.error().ok_or_else(|| Error::Engine("no row of logits was compared".into()))?;
        Ok(Quality {
            tokens,
            perplexity: (self.nll / tokens as f64).exp(),
            mean_kl: error.mean_kl,
            max_kl: error.max_kl,
            top1: error.argmax_agreement,
        })
    }
}

fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mass: f64 = logits.iter().map(|&x| f64::from((x - largest).exp())).sum();
    mass.ln() + f64::from(largest) - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods() {
        let logits = [1.0f32, 3.0, -2.0];
        let mass: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for (token, &x) in logits.iter().enumerate() {
            let wanted = mass.ln() - f64::from(x);
            assert!((negative_log_likelihood(&logits, token as u32) - wanted).abs() < 1e-6);
        }
    }
}
