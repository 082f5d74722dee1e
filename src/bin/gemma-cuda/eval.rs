//! `gemma-cuda eval`

use std::path::PathBuf;

use anyhow::Result;
use gemma_cuda::checkpoint::Checkpoint;
use gemma_cuda::eval::{DEFAULT_WINDOW, Quality, compare, perplexity};
use serde::Serialize;

use crate::args::ModelArgs;
use crate::exit::{Outcome, bad_input};
use crate::interrupt::Interrupt;
use crate::{output, progress, prompts};

#[derive(clap::Args)]
#[command(after_help = "\
The text is cut into windows that do not overlap; each starts with the beginning-of-sequence token, which is not
counted. Perplexity is exp(nll / tokens), nll being in nats.

With --compare, other checkpoints, quantized ones for example, run beside the model over the same tokens. Each has its
perplexity, the mean and the largest Kullback-Leibler divergence of its distributions from the model's, in nats, and the
share of tokens for which both find the same one likeliest.

Examples:
  gemma-cuda eval -m gemma-3-270m --file wiki.txt --window 1024
  gemma-cuda eval -m gemma-3-270m --json < wiki.txt
  gemma-cuda eval -m gemma-3-270m --file wiki.txt --compare gemma-3-270m-fp8 gemma-3-270m-fp8-channel")]
pub struct Args {
    /// The text [default: standard input]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Tokens in a window, the beginning-of-sequence token included [default: 2048, or the context if smaller]
    #[arg(long, value_name = "TOKENS")]
    window: Option<usize>,

    /// Other checkpoints to hold against the model
    #[arg(long, value_name = "DIR", num_args = 1..)]
    compare: Vec<PathBuf>,

    /// Write JSON, one object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

pub fn run(args: Args) -> Result<Outcome> {
    let _exits_at_once = Interrupt::install()?;
    let text = match &args.file {
        Some(path) => prompts::read(path)?,
        None => prompts::from_stdin()?,
    };
    if !args.compare.is_empty() {
        return run_comparison(&args, &text);
    }
    let model = args.model.load(args.model.scoring_options())?;
    let bar = progress::tokens();
    let result = perplexity(&model, &text, args.window, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let result = result?;
    if args.json {
        output::json(&result)?;
    } else {
        output::text(&format!(
            "perplexity  {:.4}\nnll         {:.4} nats ({:.6} a token)\ntokens      {} in {} windows of {}\nspeed       {:.1} tokens/s\n",
            result.perplexity,
            result.nll,
            result.nll / result.tokens as f64,
            result.tokens,
            result.windows,
            result.window,
            result.tokens_per_second,
        ))?;
    }
    Ok(Outcome::Done)
}

/// One model of a comparison.
#[derive(Serialize)]
struct Line {
    model: String,
    #[serde(flatten)]
    quality: Quality,
    /// Of the perplexity, from the baseline's: 0.01 is one percent worse.
    change: f64,
}

fn run_comparison(args: &Args, text: &str) -> Result<Outcome> {
    let baseline = Checkpoint::open(&args.model.model)?;
    let candidates = args.compare.iter().map(|dir| Checkpoint::open(dir)).collect::<gemma_cuda::Result<Vec<_>>>()?;
    let missing = |what: &str| bad_input(format!("{}: the checkpoint has no {what}", args.model.model.display()));
    let tokenizer = baseline.tokenizer().ok_or_else(|| missing("tokenizer.json"))?;
    let bos = baseline.generation_config().bos_token_id.ok_or_else(|| missing("beginning-of-sequence token"))?;
    let tokens = tokenizer.encode(text, false)?;
    let window = args.window.unwrap_or(DEFAULT_WINDOW.min(baseline.spec().max_positions as usize));
    let bar = progress::tokens();
    let options = args.model.scoring_options();
    let found = compare(&baseline, &candidates, &options, bos, &tokens, window, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let names = std::iter::once(&args.model.model).chain(&args.compare);
    let lines: Vec<Line> = names
        .zip(&found)
        .map(|(dir, &quality)| Line {
            model: dir.display().to_string(),
            quality,
            change: quality.perplexity / found[0].perplexity - 1.0,
        })
        .collect();
    if args.json {
        lines.iter().try_for_each(output::json)?;
    } else {
        output::text(&table(&lines))?;
    }
    Ok(Outcome::Done)
}

fn table(lines: &[Line]) -> String {
    let width = lines.iter().map(|line| line.model.chars().count()).max().unwrap_or(0).max("model".len());
    let mut out = format!("{:width$}  perplexity   change    mean KL     max KL   same top token\n", "model");
    for Line { model, quality, change } in lines {
        out += &format!(
            "{model:width$}  {:>10.4} {:>+7.2}% {:>10.6} {:>10.4} {:>15.2}%\n",
            quality.perplexity,
            change * 100.0,
            quality.mean_kl,
            quality.max_kl,
            quality.top1 * 100.0
        );
    }
    out + &format!("{} tokens\n", lines.first().map_or(0, |line| line.quality.tokens))
}
