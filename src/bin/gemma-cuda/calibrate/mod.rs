//! `gemma-cuda calibrate`

mod chart;

use std::path::PathBuf;

use anyhow::Result;
use gemma_cuda::calibrate::{CacheType, Method, Recipe, RecipeKind, Statistics, TextFormat};
use gemma_cuda::calibrate::{gather, sequences, write_checkpoint};
use gemma_cuda::checkpoint::Checkpoint;
use serde::Serialize;

use crate::args::ModelArgs;
use crate::exit::{Outcome, bad_input};
use crate::interrupt::Interrupt;
use crate::{output, progress};

#[derive(clap::Args)]
#[command(after_help = "\
The model runs over the text in bf16, as it would to generate, and the magnitudes of all activations are counted. Scales
follow from them, and the checkpoint is written with its matrices in FP8 (E4M3), as compressed-tensors, which this
program and transformers load.

Recipes:
  static   one scale a matrix and one for its inputs, which calibration finds; the fastest
  channel  a scale for each row of a matrix and for each token of its inputs; the most exact, needs no text

Methods, for the scales of activations, keys and values:
  largest             the largest magnitude there was; nothing of the text saturates
  percentile=99.99    what so many percent do not exceed; the others saturate
  mse                 the least squared error
  one                 every scale is 1, as without calibration; for comparison only

With --statistics FILE what was counted is kept: a run that is interrupted goes on from it, and another recipe of the same
text takes no time. The text is plain, or JSON lines (.jsonl) with an object's `text` each.

Examples:
  gemma-cuda calibrate -m gemma-3-270m --text wiki.txt --out gemma-3-270m-fp8
  gemma-cuda calibrate -m gemma-3-270m --recipe channel --out gemma-3-270m-fp8-channel
  gemma-cuda calibrate -m gemma-7b --text wiki.jsonl --max-tokens 500000 --statistics gemma-7b.stats --cache fp8 \\
      --chart amax.svg --out gemma-7b-fp8")]
pub struct Args {
    /// Text to calibrate with; not needed for `--recipe channel` with a bf16 cache
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Folder to write; it must not exist. Without it, only the report is made
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// static or channel
    #[arg(long, default_value = "static", value_name = "RECIPE")]
    recipe: RecipeKind,

    /// Keys and values: bf16, fp8 (a scale for each head) or fp8-tensor (one a layer, for loaders that know no other)
    #[arg(long, default_value = "bf16", value_name = "TYPE")]
    cache: CacheType,

    /// The output embedding in FP8 too
    #[arg(long)]
    fp8_lm_head: bool,

    /// Layers whose matrices stay as they are: 0,1,17
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    keep: Vec<u32>,

    /// largest, percentile=P, mse or one
    #[arg(long, default_value = "largest", value_name = "METHOD")]
    method: Method,

    /// Tokens in a sequence
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    window: usize,

    /// Stop after so many tokens [default: all of the text]
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<usize>,

    /// File to keep what was counted in, and to go on from
    #[arg(long, value_name = "FILE")]
    statistics: Option<PathBuf>,

    /// Draw the largest magnitudes by layer
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,

    /// Write the report as JSON, one object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

/// One tensor's magnitudes.
#[derive(Serialize)]
struct Row {
    tensor: String,
    largest: f32,
    /// What 99.9 % of all elements do not exceed.
    p999: f32,
    /// How far the largest stands out of them.
    outlier: f32,
}

pub fn run(args: Args) -> Result<Outcome> {
    let _exits_at_once = Interrupt::install()?;
    let checkpoint = Checkpoint::open(&args.model.model)?;
    let recipe = Recipe {
        kind: args.recipe,
        cache: args.cache,
        fp8_lm_head: args.fp8_lm_head,
        keep: args.keep.clone(),
        method: args.method,
    };
    if args.text.is_none() && (recipe.needs_statistics() || args.out.is_none()) {
        return Err(bad_input("--text is missing: static scales come of calibration with a text"));
    }
    if let Some(out) = args.out.as_ref().filter(|out| out.exists()) {
        return Err(bad_input(format!("{} is there already; name a new folder", out.display())));
    }
    let statistics = args.text.as_ref().map(|text| calibrate(&args, &checkpoint, text)).transpose()?;
    if let Some(statistics) = &statistics {
        report(&args, statistics)?;
    }
    if let Some(out) = &args.out {
        let bar = progress::writing();
        write_checkpoint(&checkpoint, statistics.as_ref(), &recipe, out, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        output::note(&format!("wrote {}", out.display()));
    }
    Ok(Outcome::Done)
}

fn calibrate(args: &Args, checkpoint: &Checkpoint, text: &std::path::Path) -> Result<Statistics> {
    let sequences = sequences(checkpoint, text, TextFormat::of(text), args.window, args.max_tokens)?;
    let bar = progress::tokens();
    let statistics =
        gather(checkpoint, &args.model.options(), &sequences, args.statistics.as_deref(), |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
    bar.finish_and_clear();
    Ok(statistics)
}

fn report(args: &Args, statistics: &Statistics) -> Result<()> {
    let mut rows: Vec<Row> = statistics
        .tensors()
        .map(|(name, magnitudes)| {
            let largest = magnitudes.largest().iter().fold(0.0, |a: f32, &b| a.max(b));
            let p999 = magnitudes.percentile(99.9);
            let outlier = if p999 > 0.0 { largest / p999 } else { 1.0 };
            Row { tensor: name.to_owned(), largest, p999, outlier }
        })
        .collect();
    rows.sort_by_key(|row| chart::place(&row.tensor));
    if let Some(path) = &args.chart {
        let svg = chart::svg(&rows.iter().map(|row| (row.tensor.as_str(), row.largest)).collect::<Vec<_>>());
        std::fs::write(path, svg).map_err(|source| gemma_cuda::Error::Io { path: path.clone(), source })?;
    }
    if args.json {
        return rows.iter().try_for_each(output::json);
    }
    let mut text = format!(
        "{} tokens. Largest magnitudes; `outlier` is how far they stand out of 99.9 % of all\n\n{:52} {:>10} {:>10} {:>8}\n",
        statistics.tokens(),
        "tensor",
        "largest",
        "99.9 %",
        "outlier"
    );
    for row in &rows {
        text += &format!("{:52} {:>10.4} {:>10.4} {:>7.1}x\n", row.tensor, row.largest, row.p999, row.outlier);
    }
    Ok(output::text(&text)?)
}
