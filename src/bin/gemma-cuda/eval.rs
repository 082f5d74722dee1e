//! `gemma-cuda eval`

use std::path::PathBuf;

use anyhow::Result;
use gemma_cuda::eval::perplexity;

use crate::args::ModelArgs;
use crate::exit::Outcome;
use crate::interrupt::Interrupt;
use crate::{output, progress, prompts};

#[derive(clap::Args)]
#[command(after_help = "\
The text is cut into windows that do not overlap; each starts with the beginning-of-sequence token, which is not
counted. Perplexity is exp(nll / tokens), nll being in nats.

Examples:
  gemma-cuda eval -m gemma-3-270m --file wiki.txt --window 1024
  gemma-cuda eval -m gemma-3-270m --json < wiki.txt")]
pub struct Args {
    /// The text [default: standard input]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Tokens in a window, the beginning-of-sequence token included [default: 2048, or the context if smaller]
    #[arg(long, value_name = "TOKENS")]
    window: Option<usize>,

    /// Write one JSON object
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
