//! Models against a baseline on the same text, token by token.

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, SamplingConfig, StepItem};
use crate::load;
use crate::parallel::in_parallel;
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
    sums: Sums,
}

/// Added up over all tokens.
#[derive(Clone, Copy, Default)]
struct Sums {
    nll: f64,
    kl: f64,
    max_kl: f64,
    agreeing: usize,
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
        Ok(Model { engine: loaded.engine, at_once, sums: Sums::default() })
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
    Ok(models.iter().map(|model| model.sums.quality(tokens.len())).collect())
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
            let output = model.engine.step(&[item])?.remove(0);
            if !output.failure.is_empty() {
                return Err(Error::Engine(output.failure));
            }
            let rows: Vec<&[f32]> = output.logits.chunks_exact(vocab).collect();
            if golden.is_empty() {
                golden = in_parallel(&rows, |_, row| Distribution::of(row));
            }
            let parts = in_parallel(&rows, |index, row| golden[index].sums(row, now[index]));
            parts.iter().for_each(|part| model.sums.add(part));
        }
        progress(now.len());
        next = rest;
    }
    for (model, id) in models.iter_mut().zip(ids) {
        model.engine.remove_sequence(id)?;
    }
    Ok(())
}

impl Sums {
    fn add(&mut self, more: &Sums) {
        self.nll += more.nll;
        self.kl += more.kl;
        self.max_kl = self.max_kl.max(more.max_kl);
        self.agreeing += more.agreeing;
    }

    fn quality(&self, tokens: usize) -> Quality {
        let count = tokens as f64;
        Quality {
            tokens,
            perplexity: (self.nll / count).exp(),
            mean_kl: self.kl / count,
            max_kl: self.max_kl,
            top1: self.agreeing as f64 / count,
        }
    }
}

/// What the baseline expects to come next.
struct Distribution {
    logits: Vec<f32>,
    probabilities: Vec<f32>,
    /// Logarithm of the sum of the logits' exponentials.
    norm: f64,
    top: usize,
}

impl Distribution {
    fn of(row: &[f32]) -> Self {
        let norm = log_sum_exp(row);
        let probabilities = row.iter().map(|&logit| (logit - norm as f32).exp()).collect();
        Distribution { logits: row.to_vec(), probabilities, norm, top: first_largest(row) }
    }

    /// Of a row of logits for the same token, after which `next` came.
    fn sums(&self, ours: &[f32], next: u32) -> Sums {
        let norm = log_sum_exp(ours);
        // The sum of p (ln p - ln q), where ln p and ln q are logits less their norms.
        let shift = (self.norm - norm) as f32;
        let terms = self.probabilities.iter().zip(self.logits.iter().zip(ours));
        let kl = sum(terms.map(|(&p, (&golden, &ours))| p * (golden - ours - shift))).max(0.0); // rounding
        let agreeing = usize::from(first_largest(ours) == self.top);
        Sums { nll: norm - f64::from(ours[next as usize]), kl, max_kl: kl, agreeing }
    }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let largest = largest(row);
    sum(row.iter().map(|&logit| (logit - largest).exp())).ln() + f64::from(largest)
}

/// Sixteen at a time, which a compiler can do at once.
fn largest(row: &[f32]) -> f32 {
    let (runs, rest) = row.as_chunks::<16>();
    let mut best = [f32::NEG_INFINITY; 16];
    for run in runs {
        best.iter_mut().zip(run).for_each(|(best, &x)| *best = if x > *best { x } else { *best });
    }
    best.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

fn first_largest(row: &[f32]) -> usize {
    let largest = largest(row);
    row.iter().position(|&x| x == largest).unwrap_or(0)
}

/// Short sums in float32, added up in float64.
fn sum(terms: impl Iterator<Item = f32>) -> f64 {
    let (mut all, mut run, mut count) = (0.0, 0.0f32, 0);
    for term in terms {
        run += term;
        count += 1;
        if count == 256 {
            all += f64::from(run);
            (run, count) = (0.0, 0);
        }
    }
    all + f64::from(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_distances() {
        let (golden, ours) = ([0.0f32, 0.0], [3f32.ln(), 0.0]);
        let found = Distribution::of(&golden).sums(&ours, 1);
        let expected = 0.5 * (2.0f64 / 3.0).ln() + 0.5 * 2.0f64.ln(); // from (1/2, 1/2) to (3/4, 1/4)
        assert!((found.kl - expected).abs() < 1e-6);
        assert!((found.nll - 4f64.ln()).abs() < 1e-6);
        assert_eq!(found.agreeing, 1); // the first of equal ones
        let itself = Distribution::of(&ours).sums(&ours, 0);
        assert!(itself.kl < 1e-7 && itself.agreeing == 1);
    }

    #[test]
    fn long_rows() {
        let row: Vec<f32> = (0..10_007).map(|i| (i * 7919 % 1000) as f32 / 100.0).collect();
        let exact = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&row) - exact).abs() < 1e-6);
        assert_eq!(row[first_largest(&row)], 9.99);
        let shifted: Vec<f32> = row.iter().map(|x| x + 3.0).collect(); // the same distribution
        assert!(Distribution::of(&row).sums(&shifted, 0).kl < 1e-6);
    }
}
