//! The command line.

mod args;
mod bench;
mod calibrate;
mod chat;
mod eval;
mod exit;
mod generate;
mod inspect;
mod interrupt;
mod output;
mod progress;
mod prompts;
mod verify;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Run Google Gemma 1, 2 and 3 from Hugging Face checkpoints, on NVIDIA GPUs or on the CPU.
///
/// A checkpoint is a folder with config.json, safetensors files and, for text, tokenizer.json.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  gemma-cuda generate --model gemma-3-270m --prompt 'The capital of France is' --max-new-tokens 32
  gemma-cuda generate --model gemma-3-1b-it --chat --prompt 'Why is the sky blue?'
  gemma-cuda chat --model gemma-3-1b-it
  gemma-cuda inspect --model gemma-3-1b-it --check
  gemma-cuda calibrate --model gemma-3-270m --text wiki.txt --out gemma-3-270m-fp8
  gemma-cuda eval --model gemma-3-270m --file wiki.txt
  gemma-cuda bench --random gemma-7b --workload seed
  gemma-cuda verify --model gemma-3-270m --golden golden.safetensors --dtype f32 --max-abs 1e-3

Exit codes: 0 done, 1 failed or beyond a limit, 2 bad input, 130 interrupted."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// What to log to standard error: error, warn, info, debug or trace, or filters as in RUST_LOG, which this
    /// overrides
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Continue one or more prompts
    Generate(generate::Args),
    /// Talk with an instruction-tuned model
    Chat(chat::Args),
    /// Say what a checkpoint holds and how much memory it needs
    Inspect(inspect::Args),
    /// Make an FP8 checkpoint, with scales from a text
    Calibrate(calibrate::Args),
    /// Measure how well a model predicts a text
    Eval(eval::Args),
    /// Measure speed on fixed workloads
    Bench(bench::Args),
    /// Compare an engine with golden values of another implementation
    Verify(verify::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = start_log(cli.log).and_then(|()| match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Verify(args) => verify::run(args),
    });
    exit::code(result)
}

fn start_log(option: Option<String>) -> anyhow::Result<()> {
    let (origin, filter) = match (option, std::env::var("RUST_LOG")) {
        (Some(filter), _) => ("--log", filter),
        (None, Ok(filter)) => ("RUST_LOG", filter),
        (None, Err(_)) => ("the default", "warn".into()),
    };
    let filter =
        EnvFilter::try_new(&filter).map_err(|error| exit::bad_input(format!("{origin} {filter:?}: {error}")))?;
    let color = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(color).with_writer(std::io::stderr).init();
    Ok(())
}
