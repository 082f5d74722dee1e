//! `gemma-cuda chat`

use std::io::{BufRead, IsTerminal, stdin};

use anyhow::{Context, Result};
use gemma_cuda::checkpoint::Message;
use gemma_cuda::{Error, FinishReason, Gemma, Generation, Request};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::{ModelArgs, SamplingArgs};
use crate::exit::{Outcome, bad_input};
use crate::interrupt::Interrupt;
use crate::output;

const HELP: &str = "\
/reset  forget the conversation
/exit   leave (as does Ctrl-D)
/help   show this
Ctrl-C while the model answers cuts the answer short. Anything else is said to the model.
";

#[derive(clap::Args)]
#[command(after_help = "\
The conversation stays in the KV cache, so each turn computes only what is new.
With input that is not a terminal, each line is one turn.

Examples:
  gemma-cuda chat -m gemma-3-1b-it
  printf 'My name is Ada.\\nWhat is my name?\\n' | gemma-cuda chat -m gemma-3-1b-it --greedy")]
pub struct Args {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Most tokens of an answer [default: 256, or as many as fit]
    #[arg(long, short = 'n', value_name = "N")]
    max_new_tokens: Option<usize>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: Args) -> Result<Outcome> {
    let interrupt = Interrupt::install()?;
    let model = args.model.load(args.model.options())?;
    if model.chat_template().is_none() {
        return Err(bad_input(format!(
            "{}: the checkpoint has no chat template; use an instruction-tuned model, or `generate`",
            args.model.model.display()
        )));
    }
    let mut input = Input::new()?;
    if input.interactive() {
        output::text(&format!("{} - /help for help\n", model.device()))?;
    }
    let mut conversation = Conversation::new(&args);
    loop {
        let line = match input.line()? {
            Line::Said(line) => line,
            Line::End => return Ok(Outcome::Done),
            Line::Interrupted => return Ok(Outcome::Interrupted),
        };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(Outcome::Done),
            "/reset" => conversation = Conversation::new(&args),
            "/help" => output::text(HELP)?,
            command if command.starts_with('/') => output::note(&format!("no command {command}; /help lists them")),
            said => {
                let interrupted = conversation.turn(&model, said, &interrupt)?;
                if interrupted && !input.interactive() {
                    return Ok(Outcome::Interrupted);
                }
            }
        }
    }
}

struct Conversation<'a> {
    args: &'a Args,
    messages: Vec<Message>,
}

impl<'a> Conversation<'a> {
    fn new(args: &'a Args) -> Self {
        Conversation { args, messages: args.system.iter().map(Message::system).collect() }
    }

    /// Says something and writes the answer; true if Ctrl-C cut it short. What does not fit the context any more is not
    /// taken into the conversation.
    fn turn(&mut self, model: &Gemma, said: &str, interrupt: &Interrupt) -> Result<bool> {
        let mut messages = self.messages.clone();
        messages.push(Message::user(said));
        let mut request = Request::new(messages.clone()).sampling(self.args.sampling.params());
        if let Some(tokens) = self.args.max_new_tokens {
            request = request.max_new_tokens(tokens);
        }
        let mut generation = match model.generate(request) {
            Err(Error::TooLong(message)) => {
                output::note(&format!("{message}; /reset starts anew"));
                return Ok(false);
            }
            started => started?,
        };
        interrupt.watch([generation.canceller()]);
        let written = write(&mut generation);
        let interrupted = interrupt.take();
        written?;
        let completion = generation.finish()?;
        if completion.finish_reason == FinishReason::Length {
            output::note(&format!("(cut at {} tokens; --max-new-tokens sets the most)", completion.token_ids.len()));
        }
        messages.push(Message::model(completion.text));
        self.messages = messages;
        Ok(interrupted)
    }
}

fn write(generation: &mut Generation) -> Result<()> {
    for piece in generation {
        output::text(&piece?.text)?;
    }
    Ok(output::text("\n")?)
}

/// An editor on a terminal, plain lines elsewhere.
enum Input {
    Terminal(Box<DefaultEditor>),
    Plain(std::io::StdinLock<'static>),
}

enum Line {
    Said(String),
    End,
    Interrupted,
}

impl Input {
    fn new() -> Result<Self> {
        if stdin().is_terminal() {
            return Ok(Input::Terminal(Box::new(DefaultEditor::new().context("cannot use the terminal")?)));
        }
        Ok(Input::Plain(stdin().lock()))
    }

    fn interactive(&self) -> bool {
        matches!(self, Input::Terminal(_))
    }

    fn line(&mut self) -> Result<Line> {
        match self {
            Input::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line).context("cannot keep the line")?;
                    Ok(Line::Said(line))
                }
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(error) => Err(error).context("cannot read the terminal"),
            },
            Input::Plain(stdin) => {
                let mut bytes = Vec::new();
                if stdin.read_until(b'\n', &mut bytes).context("cannot read standard input")? == 0 {
                    return Ok(Line::End);
                }
                let line = String::from_utf8(bytes).map_err(|_| bad_input("standard input is not valid UTF-8"))?;
                Ok(Line::Said(line))
            }
        }
    }
}
