//! `gemma-cuda generate`

use std::path::PathBuf;

use anyhow::Result;
use gemma_cuda::checkpoint::Message;
use gemma_cuda::{Completion, Gemma, Generation, Prompt, Request};
use serde::Serialize;

use crate::args::{ModelArgs, SamplingArgs, token_ids};
use crate::exit::{Outcome, bad_input};
use crate::interrupt::Interrupt;
use crate::{output, prompts};

#[derive(clap::Args)]
#[command(after_help = "\
Text is written as it is generated. Several prompts are computed together and written in their order.

Examples:
  gemma-cuda generate -m gemma-3-270m --prompt 'Once upon a time' --temperature 0.8 --seed 1
  echo 'Once upon a time' | gemma-cuda generate -m gemma-3-270m --greedy --stop '.'
  gemma-cuda generate -m gemma-3-1b-it --chat --prompts-file questions.txt --json > answers.jsonl
  gemma-cuda generate -m gemma-3-270m --prompt-ids 2,818,5279 --json --logprobs 5")]
pub struct Args {
    /// Text to continue; may be repeated. Without any prompt, standard input is the prompt
    #[arg(long, short, value_name = "TEXT")]
    prompt: Vec<String>,

    /// File with one prompt a line
    #[arg(long, value_name = "FILE")]
    prompts_file: Option<PathBuf>,

    /// Token ids to continue, such as 2,818,5279; may be repeated. Needs no tokenizer
    #[arg(long, value_name = "IDS")]
    prompt_ids: Vec<String>,

    /// Take each prompt as what a user says, in the model's chat template
    #[arg(long, conflicts_with = "prompt_ids")]
    chat: bool,

    /// Most tokens to generate [default: 256, or as many as fit]
    #[arg(long, short = 'n', value_name = "N")]
    max_new_tokens: Option<usize>,

    /// Do not end before so many tokens
    #[arg(long, default_value_t = 0, value_name = "N")]
    min_new_tokens: usize,

    /// End where this text appears, which is not written; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// End at this token; may be repeated
    #[arg(long, value_name = "ID")]
    stop_token: Vec<u32>,

    /// Do not end at the checkpoint's own end tokens
    #[arg(long)]
    ignore_eos: bool,

    /// Write one JSON object a line: text, token_ids, prompt_token_ids, finish_reason, seed, timing, ...
    #[arg(long)]
    json: bool,

    /// With each generated token, its log-probability and the N likeliest tokens (0 to 20)
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<u32>,

    /// The same for the tokens of the prompt
    #[arg(long, value_name = "N", requires = "json")]
    prompt_logprobs: Option<u32>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Serialize)]
struct Line<'a> {
    /// Of the prompt, counted from 0.
    index: usize,
    #[serde(flatten)]
    completion: &'a Completion,
}

pub fn run(args: Args) -> Result<Outcome> {
    let interrupt = Interrupt::install()?;
    let prompts = args.prompts()?;
    let model = args.model.load(args.model.options())?;
    let requests = prompts.into_iter().map(|prompt| args.request(prompt));
    let generations = start(&model, requests)?;
    interrupt.watch(generations.iter().map(Generation::canceller));
    if args.json {
        write_json(generations)?
    } else {
        write_text(generations)?
    }
    Ok(if interrupt.take() { Outcome::Interrupted } else { Outcome::Done })
}

impl Args {
    /// In the order: --prompt, --prompts-file, --prompt-ids; else standard input.
    fn prompts(&self) -> Result<Vec<Prompt>> {
        let mut texts = self.prompt.clone();
        if let Some(path) = &self.prompts_file {
            texts.extend(prompts::from_file(path)?);
        }
        if texts.is_empty() && self.prompt_ids.is_empty() {
            texts.push(prompts::from_stdin()?);
        }
        if texts.iter().any(String::is_empty) {
            return Err(bad_input("the prompt is empty; give some text with --prompt or on standard input"));
        }
        let text = |text: String| if self.chat { vec![Message::user(text)].into() } else { Prompt::Text(text) };
        let ids = self.prompt_ids.iter().map(|ids| Ok(Prompt::Tokens(token_ids(ids)?)));
        texts.into_iter().map(|prompt| Ok(text(prompt))).chain(ids).collect()
    }

    fn request(&self, prompt: Prompt) -> Request {
        let mut request = Request::new(prompt)
            .sampling(self.sampling.params())
            .min_new_tokens(self.min_new_tokens)
            .stop(self.stop.iter().cloned())
            .stop_tokens(self.stop_token.iter().copied())
            .ignore_eos(self.ignore_eos);
        if let Some(tokens) = self.max_new_tokens {
            request = request.max_new_tokens(tokens);
        }
        if let Some(top) = self.logprobs {
            request = request.logprobs(top);
        }
        if let Some(top) = self.prompt_logprobs {
            request = request.prompt_logprobs(top);
        }
        request
    }
}

/// All or none: a prompt that is refused is known before the first word is written.
fn start(model: &Gemma, requests: impl Iterator<Item = Request>) -> Result<Vec<Generation>> {
    Ok(requests.map(|request| model.generate(request)).collect::<Result<_, _>>()?)
}

fn write_text(generations: Vec<Generation>) -> Result<()> {
    let count = generations.len();
    for (index, mut generation) in generations.into_iter().enumerate() {
        if count > 1 {
            output::text(&format!("==> {}/{count} <==\n", index + 1))?;
        }
        for piece in &mut generation {
            let text = piece?.text;
            if !text.is_empty() {
                output::text(&text)?;
            }
        }
        output::text("\n")?;
    }
    Ok(())
}

fn write_json(generations: Vec<Generation>) -> Result<()> {
    for (index, generation) in generations.into_iter().enumerate() {
        output::json(&Line { index, completion: &generation.finish()? })?;
    }
    Ok(())
}
