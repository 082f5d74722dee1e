//! `gemma-cuda bench`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use gemma_cuda::checkpoint::named_shape;
use gemma_cuda::{Gemma, KvCache, LoadOptions, Request, SamplingParams};
use serde::Serialize;

use crate::exit::{Outcome, bad_input};
use crate::interrupt::Interrupt;
use crate::output;

#[derive(clap::Args)]
#[command(after_help = "\
Workloads (greedy, nothing but the number of tokens ends a generation):
  seed      64 prompts of 1 to 128 tokens, 896 new tokens each
  tutorial  64 prompts of 1 to 20 tokens, 492 new tokens each
  single    one prompt of 128 tokens, 512 new tokens
  mixed     256 prompts of 16 to 512 tokens, 16 to 512 new tokens, 64 at once
  prefill   8 prompts of 4096 tokens, one new token each

Each runs once to warm up, with few new tokens, and then as often as --repeat says; the fastest counts.

Examples:
  gemma-cuda bench --random gemma-7b --workload seed,single
  gemma-cuda bench --model gemma-3-1b-it --json")]
pub struct Args {
    /// Folder of the checkpoint
    #[arg(long, short, value_name = "DIR", required_unless_present = "random")]
    model: Option<PathBuf>,

    /// Random weights in the shape of a published model, such as gemma-7b: made on the device, nothing to download
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    random: Option<String>,

    /// What to run
    #[arg(long, value_delimiter = ',', default_values_t = [Workload::Seed, Workload::Tutorial, Workload::Single, Workload::Mixed, Workload::Prefill])]
    workload: Vec<Workload>,

    /// Timed runs of each workload
    #[arg(long, default_value_t = 1, value_name = "N")]
    repeat: u32,

    /// Where to run: auto, reference (the CPU) or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: String,

    /// Tokens in one page of the KV cache
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    page_size: u32,

    /// Most new tokens in one step, over all prompts
    #[arg(long, default_value_t = 8192, value_name = "TOKENS")]
    max_batch_tokens: u32,

    /// Do not capture decode steps as CUDA graphs
    #[arg(long)]
    no_graphs: bool,

    /// Write one JSON object a workload
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Workload {
    Seed,
    Tutorial,
    Single,
    Mixed,
    Prefill,
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
}

/// Tokens of a request.
#[derive(Clone, Copy)]
struct Lengths {
    prompt: usize,
    new: usize,
}

impl Workload {
    fn requests(self) -> Vec<Lengths> {
        // Evenly from the lowest to the highest, in an order that mixes them.
        let spread = |i: usize, of: usize, low: usize, high: usize| low + i * 37 % of * (high - low) / (of - 1).max(1);
        match self {
            Workload::Seed => (0..64).map(|i| Lengths { prompt: spread(i, 64, 1, 128), new: 896 }).collect(),
            Workload::Tutorial => (0..64).map(|i| Lengths { prompt: spread(i, 64, 1, 20), new: 492 }).collect(),
            Workload::Single => vec![Lengths { prompt: 128, new: 512 }],
            Workload::Mixed => (0..256)
                .map(|i| Lengths { prompt: spread(i, 256, 16, 512), new: spread(i * 5 + 11, 256, 16, 512) })
                .collect(),
            Workload::Prefill => vec![Lengths { prompt: 4096, new: 1 }; 8],
        }
    }
}

#[derive(Serialize)]
struct Row {
    workload: String,
    device: String,
    model: String,
    graphs: bool,
    requests: usize,
    prompt_tokens: usize,
    new_tokens: usize,
    seconds: f64,
    /// Over prompts and generated tokens alike where nothing but prompts is computed; else generated ones.
    tokens_per_second: f64,
    /// FNV-1a over all generated tokens, request by request.
    tokens_hash: String,
}

pub fn run(args: Args) -> Result<Outcome> {
    let _exits_at_once = Interrupt::install()?;
    let model = load(&args)?;
    let name = args.random.clone().or(args.model.as_ref().map(|dir| dir.display().to_string())).unwrap_or_default();
    if !args.json {
        output::text(&format!(
            "{name} on {}\n{:>10} {:>9} {:>8} {:>8} {:>9} {:>10}  {}\n",
            model.device(),
            "workload",
            "requests",
            "prompt",
            "new",
            "seconds",
            "tokens/s",
            "tokens"
        ))?;
    }
    for &workload in &args.workload {
        let row = measure(&model, workload, &args, &name)?;
        if args.json {
            output::json(&row)?;
        } else {
            output::text(&format!(
                "{:>10} {:>9} {:>8} {:>8} {:>9.3} {:>10.1}  {}\n",
                row.workload,
                row.requests,
                row.prompt_tokens,
                row.new_tokens,
                row.seconds,
                row.tokens_per_second,
                row.tokens_hash
            ))?;
        }
    }
    Ok(Outcome::Done)
}

fn load(args: &Args) -> Result<Gemma> {
    let page = args.page_size as usize;
    // Whole pages for the 64 longest requests of each workload.
    let tokens = args.workload.iter().map(|workload| {
        let mut lengths: Vec<usize> =
            workload.requests().iter().map(|r| (r.prompt + r.new).next_multiple_of(page)).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(64).sum::<usize>()
    });
    let options = LoadOptions {
        device: args.device.clone(),
        kv_cache: KvCache::Tokens(tokens.max().unwrap_or(0) as u64),
        page_size: args.page_size,
        max_batch_tokens: args.max_batch_tokens,
        max_sequences: 64,
        graphs: !args.no_graphs,
        prefix_cache: false,
        ..Default::default()
    };
    Ok(match (&args.random, &args.model) {
        (Some(name), _) => Gemma::random(&named_shape(name)?, &options, 1)?,
        (None, Some(dir)) => Gemma::load(dir, options)?,
        (None, None) => return Err(bad_input("give --model or --random")),
    })
}

fn measure(model: &Gemma, workload: Workload, args: &Args, name: &str) -> Result<Row> {
    let requests = workload.requests();
    generate(model, &requests, 8)?;
    let mut best: Option<(Duration, String)> = None;
    for _ in 0..args.repeat.max(1) {
        let run = generate(model, &requests, usize::MAX)?;
        if best.as_ref().is_none_or(|best| run.0 < best.0) {
            best = Some(run);
        }
    }
    let (time, tokens_hash) = best.unwrap_or_default();
    let prompt_tokens: usize = requests.iter().map(|request| request.prompt).sum();
    let new_tokens: usize = requests.iter().map(|request| request.new).sum();
    let counted = if workload == Workload::Prefill { prompt_tokens } else { new_tokens };
    Ok(Row {
        workload: workload.to_string(),
        device: model.device().to_owned(),
        model: name.to_owned(),
        graphs: !args.no_graphs,
        requests: requests.len(),
        prompt_tokens,
        new_tokens,
        seconds: time.as_secs_f64(),
        tokens_per_second: counted as f64 / time.as_secs_f64(),
        tokens_hash,
    })
}

/// Runs all requests at once; at most `most_new` tokens each.
fn generate(model: &Gemma, requests: &[Lengths], most_new: usize) -> Result<(Duration, String)> {
    let start = Instant::now();
    let tokens = model.spec().vocab_size.clamp(4, 10_003) - 3; // ids from 3 on
    let running = requests.iter().enumerate().map(|(i, request)| {
        let prompt: Vec<u32> = (0..request.prompt).map(|t| (i * 7919 + t * 104_729) as u32 % tokens + 3).collect();
        let request = Request::new(prompt)
            .max_new_tokens(request.new.min(most_new))
            .ignore_eos(true)
            .sampling(SamplingParams::greedy());
        model.generate(request)
    });
    let running = running.collect::<Result<Vec<_>, _>>()?;
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for generation in running {
        for id in generation.finish()?.token_ids {
            hash = (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok((start.elapsed(), format!("{hash:016x}")))
}
