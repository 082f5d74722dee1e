//! Holds an engine against golden values that another implementation computed.
//!
//! A golden file is a safetensors file with, for each prompt `i`:
//! - `p{i}.ids` I64 `[T]`: the prompt;
//! - `p{i}.greedy` I64 `[N]`: what the reference generates after it, always taking the likeliest token;
//! - `p{i}.logits` F32 `[T + N - 1, vocab]`: its logits over the prompt and all generated tokens but the last (`[T,
//!   vocab]` without `greedy`);
//! - `p{i}.hidden.{l}` F32 `[T, hidden]`: the scaled embeddings (`l` = 0), then the output of each layer over the
//!   prompt, the last one after the final norm.
//!
//! All but `ids` may be missing; what is there is compared.

mod golden;
mod run;
mod stats;

use std::path::Path;

use serde::Serialize;

pub use stats::{HiddenError, LogitError};

use self::golden::Golden;
use self::run::Runner;
use self::stats::LogitStats;
use crate::checkpoint::Checkpoint;
use crate::load::{self, LoadProgress};
use crate::options::KvCache;
use crate::{LoadOptions, Result};

/// How far an engine is from the golden values.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// One line: backend, instruction set or GPU, threads.
    pub device: String,
    /// In the order of the file.
    pub prompts: Vec<PromptReport>,
    /// Over the rows of all prompts; `None` if the file has no logits.
    pub logits: Option<LogitError>,
    /// Whether every greedy generation is the reference's; `None` if the file has none.
    pub greedy_equal: Option<bool>,
}

/// How far the engine is from the golden values of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptReport {
    /// The `i` of `p{i}.ids`.
    pub prompt: usize,
    /// Of the prompt.
    pub tokens: usize,
    /// `None` if the file has none for it.
    pub logits: Option<LogitError>,
    /// `None` if the file has none for it.
    pub greedy: Option<GreedyReport>,
    /// One a layer that the file has.
    pub hidden: Vec<HiddenError>,
}

/// How far a greedy generation goes with the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GreedyReport {
    /// Tokens of the reference.
    pub tokens: usize,
    /// How many of them, from the first on, the engine generates too.
    pub equal: usize,
}

/// How far an engine may be from the golden values; what is `None` does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tolerance {
    /// Largest difference of a logit.
    pub max_abs: Option<f64>,
    /// Relative L2 distance over all logits.
    pub rel_l2: Option<f64>,
    /// Mean Kullback-Leibler divergence, in nats.
    pub kl: Option<f64>,
    /// Least share of rows whose likeliest token is the reference's, 0 to 1.
    pub argmax: Option<f64>,
    /// Every greedy generation must be the reference's.
    pub greedy: bool,
}

impl Report {
    /// What exceeds the tolerance, one line each. A limit on something the file does not hold is exceeded too.
    pub fn exceeding(&self, tolerance: &Tolerance) -> Vec<String> {
        let mut lines = Vec::new();
        let measured = |measure: fn(&LogitError) -> f64| self.logits.as_ref().map(measure);
        // Written so that a NaN is never within a limit.
        let mut at_most = |name: &str, limit: Option<f64>, value: Option<f64>| match (limit, value) {
            (Some(limit), Some(value)) if value <= limit => {}
            (Some(limit), Some(value)) => lines.push(format!("{name} is {value:.3e}, more than {limit:.3e}")),
            (Some(_), None) => lines.push(format!("{name} is limited, but the golden file has no logits")),
            (None, _) => {}
        };
        at_most("max abs", tolerance.max_abs, measured(|error| error.max_abs));
        at_most("relative L2", tolerance.rel_l2, measured(|error| error.rel_l2));
        at_most("mean KL", tolerance.kl, measured(|error| error.mean_kl));
        at_most(
            "argmax disagreement",
            tolerance.argmax.map(|agreement| 1.0 - agreement),
            measured(|error| 1.0 - error.argmax_agreement),
        );
        if tolerance.greedy && self.greedy_equal != Some(true) {
            lines.push(match self.greedy_equal {
                Some(_) => "a greedy generation is not the reference's".into(),
                None => "greedy generations must be equal, but the golden file has none".into(),
            });
        }
        lines
    }
}

/// Loads the checkpoint in `dir` with an engine of its own and compares it with the golden values in `golden`. A KV
/// cache left at [`KvCache::Auto`] is made as large as the longest prompt needs.
///
/// # Errors
/// Those of [`Gemma::load`](crate::Gemma::load); [`Error::Checkpoint`](crate::Error::Checkpoint) if the golden file is not as described in
/// [the module](self) or belongs to another model.
pub fn verify(
    dir: impl AsRef<Path>,
    golden: impl AsRef<Path>,
    options: &LoadOptions,
    mut progress: impl FnMut(LoadProgress),
) -> Result<Report> {
    let golden = Golden::open(golden.as_ref())?;
    let checkpoint = Checkpoint::open(dir.as_ref())?;
    if options.check_weights {
        checkpoint.check_weights()?;
    }
    let spec = checkpoint.spec();
    golden.check_against(spec)?;
    let mut options = options.clone();
    if options.kv_cache == KvCache::Auto {
        options.kv_cache = KvCache::Tokens(golden.longest() as u64);
    }
    let loaded = load::load(&checkpoint, &options, &mut progress)?;
    let device = loaded.device.clone();
    let mut runner = Runner::new(loaded, spec);
    let mut total = LogitStats::default();
    let mut prompts = Vec::new();
    for prompt in golden.prompts() {
        let stats = prompt.logits.as_ref().map(|rows| runner.logits(&prompt.teacher_forced(), rows)).transpose()?;
        total.merge(stats.as_ref().unwrap_or(&LogitStats::default()));
        prompts.push(PromptReport {
            prompt: prompt.index,
            tokens: prompt.ids.len(),
            logits: stats.as_ref().and_then(LogitStats::error),
            greedy: prompt.greedy.as_ref().map(|greedy| runner.greedy(&prompt.ids, greedy)).transpose()?,
            hidden: runner.hidden(&prompt.ids, &prompt.hidden)?,
        });
    }
    let mut greedy = prompts.iter().filter_map(|prompt| prompt.greedy).peekable();
    let greedy_equal = greedy.peek().is_some().then(|| greedy.all(|greedy| greedy.equal == greedy.tokens));
    Ok(Report { device, logits: total.error(), greedy_equal, prompts })
}
