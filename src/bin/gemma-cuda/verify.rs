//! `gemma-cuda verify`

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use gemma_cuda::verify::{LogitError, Report, Tolerance, verify};
use serde::Serialize;

use crate::args::ModelArgs;
use crate::exit::Outcome;
use crate::interrupt::Interrupt;
use crate::{output, progress};

#[derive(clap::Args)]
#[command(after_help = "\
The golden file is safetensors; for each prompt i it holds p{i}.ids (I64 [T]) and any of p{i}.greedy (I64 [N]),
p{i}.logits (F32 [T+N-1, vocab], over ids and greedy[:-1]) and p{i}.hidden.{l} (F32 [T, hidden]).
KL is that of the engine's distribution from the reference's, in nats.

Examples:
  gemma-cuda verify -m gemma-3-270m --golden g.safetensors --dtype f32 --max-abs 1e-3 --greedy
  gemma-cuda verify -m gemma-3-270m --golden g.safetensors --dtype bf16 --rel-l2 0.03 --kl 2e-3 --argmax 0.97")]
pub struct Args {
    /// File of golden values
    #[arg(long, value_name = "FILE")]
    golden: PathBuf,

    /// Fail if a logit differs by more
    #[arg(long, value_name = "X")]
    max_abs: Option<f64>,

    /// Fail if the relative L2 distance of the logits is more
    #[arg(long, value_name = "X")]
    rel_l2: Option<f64>,

    /// Fail if the mean KL divergence is more
    #[arg(long, value_name = "X")]
    kl: Option<f64>,

    /// Fail if the share of positions with the same likeliest token is less (0 to 1)
    #[arg(long, value_name = "X")]
    argmax: Option<f64>,

    /// Fail if a greedy generation differs
    #[arg(long)]
    greedy: bool,

    /// Write one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Serialize)]
struct Verdict<'a> {
    #[serde(flatten)]
    report: &'a Report,
    exceeding: &'a [String],
}

pub fn run(args: Args) -> Result<Outcome> {
    let _exits_at_once = Interrupt::install()?;
    let bar = progress::loading();
    let report =
        verify(&args.model.model, &args.golden, &args.model.scoring_options(), |loaded| progress::show(&bar, loaded));
    bar.finish_and_clear();
    let report = report?;
    let exceeding = report.exceeding(&Tolerance {
        max_abs: args.max_abs,
        rel_l2: args.rel_l2,
        kl: args.kl,
        argmax: args.argmax,
        greedy: args.greedy,
    });
    if args.json {
        output::json(&Verdict { report: &report, exceeding: &exceeding })?;
    } else {
        output::text(&table(&report)?)?;
        exceeding.iter().for_each(|line| output::note(&format!("beyond the limit: {line}")));
    }
    Ok(if exceeding.is_empty() { Outcome::Done } else { Outcome::BeyondLimits })
}

fn table(report: &Report) -> Result<String> {
    let mut out = format!("{}\n", report.device);
    writeln!(
        out,
        "{:>6} {:>6} {:>5} {:>10} {:>10} {:>10} {:>10} {:>7} {:>9} {:>10}",
        "prompt", "tokens", "rows", "max abs", "rel L2", "mean KL", "max KL", "argmax", "greedy", "hidden L2"
    )?;
    for prompt in &report.prompts {
        let greedy = prompt.greedy.map_or("-".into(), |greedy| format!("{}/{}", greedy.equal, greedy.tokens));
        let worst = prompt.hidden.iter().map(|layer| layer.rel_l2).reduce(f64::max);
        let hidden = worst.map_or("-".into(), |worst| format!("{worst:.3e}"));
        let logits = columns(prompt.logits.as_ref());
        writeln!(out, "{:>6} {:>6} {logits} {greedy:>9} {hidden:>10}", prompt.prompt, prompt.tokens)?;
    }
    let greedy = report.greedy_equal.map_or("-", |equal| if equal { "equal" } else { "differ" });
    writeln!(out, "{:>13} {} {greedy:>9}", "all", columns(report.logits.as_ref()))?;
    Ok(out)
}

fn columns(error: Option<&LogitError>) -> String {
    match error {
        Some(e) => format!(
            "{:>5} {:>10.3e} {:>10.3e} {:>10.3e} {:>10.3e} {:>7.4}",
            e.rows, e.max_abs, e.rel_l2, e.mean_kl, e.max_kl, e.argmax_agreement
        ),
        None => format!("{:>5} {:>10} {:>10} {:>10} {:>10} {:>7}", "-", "-", "-", "-", "-", "-"),
    }
}
