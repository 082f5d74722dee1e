//! `gemma-cuda bench`

mod agreement;
mod chart;
mod configuration;
mod measure;
mod peer;
mod report;
mod workload;

use std::path::PathBuf;

use anyhow::Result;
use gemma_cuda::checkpoint::named_shape;
use gemma_cuda::{Error, Gemma, KvCache, LoadOptions};

use self::agreement::compare;
use self::configuration::{Configuration, LADDER, Precision, Recipe};
use self::measure::{Measured, Plan, measure};
use self::report::Row;
use self::workload::Workload;
use crate::exit::{Outcome, bad_input};
use crate::interrupt::Interrupt;
use crate::{output, progress};

#[derive(clap::Args)]
#[command(after_help = "\
Workloads (greedy, nothing but the number of tokens ends a generation):
  seed      64 prompts of 1 to 128 tokens, 896 new tokens each
  tutorial  64 prompts of 1 to 20 tokens, 492 new tokens each
  single    one prompt of 128 tokens, 512 new tokens
  mixed     256 prompts of 16 to 512 tokens, 16 to 512 new tokens, 64 at once
  prefill   8 prompts of 4096 tokens, one new token each

Each runs once to warm up, with few new tokens, and then as often as --repeat says; the fastest counts.

Figures: tokens/s counts new tokens (with `prefill`, prompts). GB/s counts what the steps had to read at least: the
weights once a step, and the keys and values in use; `of copy` is its share of what the device's own copies reach, the
ceiling of generation. TFLOP/s counts the products with weights, the ceiling of prefill. `peak` is what was allocated on
the device so far. The last column is a hash of all new tokens: equal tokens, equal hash.

--ladder runs the steps of NVIDIA's Transformer Engine tutorial on Gemma, each an engine of its own:
  padded           every prompt filled up to the longest of its batch, the next batch when the last of one has ended
                   (everything but attention computes the filling)
  ragged           sequences end to end, nothing filled up; requests join and leave as they come and go
  ragged + graphs  steps of up to 2048 tokens captured as CUDA graphs as well
  FP8, cast        matrices kept in bf16 and quantized anew for every product, as the tutorial's fourth step has it
  FP8              matrices kept in FP8 only, one scale each and one for its inputs
  FP8, FP8 K/V     keys and values in FP8 too
The rows of FP8 need --random: a checkpoint is in FP8 or it is not. Of the others it says how many requests got the same
tokens as in the first row; where some did not, how far apart the log-probabilities of the two tokens were where they
part. Behind them stands what the tutorial itself publishes, which was not measured here.

Examples:
  gemma-cuda bench --random gemma-7b --workload seed,single
  gemma-cuda bench --random gemma-7b --ladder --chart ladder.svg
  gemma-cuda bench --random gemma-7b --recipe static --cache fp8
  gemma-cuda bench --model gemma-3-1b-it --json")]
pub struct Args {
    /// Folder of the checkpoint
    #[arg(long, short, value_name = "DIR", required_unless_present = "random")]
    model: Option<PathBuf>,

    /// Random weights in the shape of a published model, such as gemma-7b: made on the device, nothing to download
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    random: Option<String>,

    /// What to run [default: all of them; with --ladder: seed,tutorial]
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    workload: Vec<Workload>,

    /// With --random: matrices in bf16, or in FP8 as `gemma-cuda calibrate` makes them (static, channel), or quantized
    /// for every product (cast)
    #[arg(long, default_value = "bf16", value_name = "RECIPE", conflicts_with_all = ["model", "ladder"])]
    recipe: Recipe,

    /// With --random: keys and values in bf16 or fp8
    #[arg(long, default_value = "bf16", value_parser = ["bf16", "fp8"], value_name = "TYPE", conflicts_with_all = ["model", "ladder"])]
    cache: String,

    /// Compare padded batches, ragged ones, captured steps, and FP8
    #[arg(long, conflicts_with = "no_graphs")]
    ladder: bool,

    /// Rows of another program for the same table and chart: what `hf_baseline.py --json` wrote
    #[arg(long, value_name = "FILE.jsonl")]
    peer: Option<PathBuf>,

    /// Timed runs of each workload
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,

    /// Cut every request down to N new tokens, for a short run
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_new: Option<u32>,

    /// Most requests computed at once: the batch of decode
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    at_once: u32,

    /// Where to run: auto, reference (the CPU) or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: String,

    /// Tokens in one page of the KV cache
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    page_size: u32,

    /// Most new tokens in one step, over all prompts
    #[arg(long, default_value_t = 8192, value_name = "TOKENS")]
    max_batch_tokens: u32,

    /// Do not capture steps as CUDA graphs
    #[arg(long)]
    no_graphs: bool,

    /// Draw a bar chart as well: seconds of each row of the ladder, or tokens/s of each workload
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,

    /// Write one JSON object a line
    #[arg(long)]
    json: bool,
}

/// What each workload's first configuration generated, request by request.
type FirstTokens = Vec<(Workload, Vec<Vec<u32>>)>;

pub fn run(args: Args) -> Result<Outcome> {
    let _exits_at_once = Interrupt::install()?;
    if let Some(path) = &args.chart {
        chart::check_place(path).map_err(bad_input)?;
    }
    let peers = args.peer.as_deref().map(peer::read).transpose().map_err(bad_input)?.unwrap_or_default();
    let mut rows = Vec::new();
    let mut first_tokens = FirstTokens::new();
    for configuration in args.configurations() {
        // The model before is gone by now: two may not fit the device.
        let model = match load(&args, configuration) {
            Err(error) if args.ladder && !configuration.as_exact_as_bf16() && lacks_fp8(&error) => {
                output::note(&format!("{}: left out; {error}", configuration.name));
                continue;
            }
            loaded => loaded?,
        };
        let copy = model.copy_bandwidth()?;
        if !args.json && rows.is_empty() {
            output::text(&report::head(&args.model_name(), model.device(), copy, args.max_new, args.ladder))?;
            peers.iter().try_for_each(|row| output::text(&report::peer_line(row)))?;
        }
        for workload in args.workloads() {
            rows.push(bench(&args, &model, copy, workload, configuration, &mut first_tokens)?);
        }
    }
    if args.ladder && !args.json {
        output::text(&report::published())?;
    }
    if let Some(path) = &args.chart {
        let chart = if args.ladder { report::ladder_chart(&rows, &peers) } else { report::speed_chart(&rows) };
        chart::write(path, &chart.svg()).map_err(bad_input)?;
    }
    Ok(Outcome::Done)
}

/// Whether a device was refused for having no FP8.
fn lacks_fp8(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::Device(why)) if why.contains("FP8 needs"))
}

impl Args {
    fn configurations(&self) -> Vec<Configuration> {
        if self.ladder {
            let with_fp8 = self.random.is_some();
            return LADDER.into_iter().filter(|row| with_fp8 || row.as_exact_as_bf16()).collect();
        }
        let precision = Precision { matrices: self.recipe.0, cache: self.cache == "fp8" };
        vec![Configuration::single(!self.no_graphs, precision)]
    }

    fn workloads(&self) -> Vec<Workload> {
        use Workload::{Mixed, Prefill, Seed, Single, Tutorial};
        match (&self.workload[..], self.ladder) {
            ([], true) => vec![Seed, Tutorial],
            ([], false) => vec![Seed, Tutorial, Single, Mixed, Prefill],
            (chosen, _) => chosen.to_vec(),
        }
    }

    fn most_new(&self) -> usize {
        self.max_new.map_or(usize::MAX, |new| new as usize)
    }

    /// Requests computed at once.
    fn at_once(&self) -> usize {
        let most = self.workloads().iter().map(|workload| workload.requests(1).len()).max().unwrap_or(1);
        most.min(self.at_once as usize)
    }

    fn plan(&self, configuration: Configuration) -> Plan {
        let batches_of = configuration.padded.then(|| self.at_once());
        Plan { most_new: self.most_new(), repeat: self.repeat, batches_of }
    }

    fn model_name(&self) -> String {
        let folder = self.model.as_ref().map(|dir| dir.display().to_string());
        self.random.clone().or(folder).unwrap_or_default()
    }
}

/// Measures one line and writes it.
fn bench(
    args: &Args,
    model: &Gemma,
    copy: f64,
    workload: Workload,
    configuration: Configuration,
    first_tokens: &mut FirstTokens,
) -> Result<Row> {
    let Measured { figures, tokens } = measure(model, workload, args.plan(configuration), copy)?;
    let exact = configuration.as_exact_as_bf16();
    let agreement = match first_tokens.iter().find(|(of, _)| *of == workload) {
        Some((_, first)) if exact => Some(compare(model, workload, first, &tokens)?),
        _ => None,
    };
    if args.ladder && exact && agreement.is_none() {
        first_tokens.push((workload, tokens));
    }
    let row = Row {
        workload,
        configuration: configuration.name,
        device: model.device().to_owned(),
        model: args.model_name(),
        padded: configuration.padded,
        graphs: configuration.graphs,
        figures,
        agreement,
    };
    if args.json {
        output::json(&row)?
    } else {
        output::text(&report::line(&row))?
    }
    if args.ladder && configuration.graphs && row.figures.captured_steps == 0 {
        output::note(&format!("{workload}: this device captures no steps; the row is the one before, once more"));
    }
    Ok(row)
}

fn load(args: &Args, configuration: Configuration) -> Result<Gemma> {
    let page = args.page_size.max(1) as usize;
    // Whole pages for the longest requests of each workload; who enters the batch wants a page to grow into.
    let tokens = args.workloads().into_iter().map(|workload| {
        let requests = workload.requests(args.most_new());
        let mut lengths: Vec<usize> =
            requests.iter().map(|r| (r.prompt + r.new.max(page)).next_multiple_of(page)).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(args.at_once()).sum::<usize>()
    });
    let options = LoadOptions {
        device: args.device.clone(),
        kv_cache: KvCache::Tokens(tokens.max().unwrap_or(0) as u64),
        page_size: args.page_size,
        max_batch_tokens: args.max_batch_tokens,
        max_sequences: args.at_once() as u32,
        graphs: configuration.graphs,
        padded: configuration.padded,
        prefix_cache: false,
        ..Default::default()
    };
    match (&args.random, &args.model) {
        (Some(name), _) => Ok(Gemma::random(&configuration.precision.of(named_shape(name)?), &options, 1)?),
        (None, Some(dir)) => {
            let bar = progress::loading();
            let model = Gemma::load_with_progress(dir, options, |loaded| progress::show(&bar, loaded));
            bar.finish_and_clear();
            Ok(model?)
        }
        (None, None) => Err(bad_input("give --model or --random")),
    }
}
