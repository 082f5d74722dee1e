//! Text as it comes, sampled: `cargo run --release --example stream -- MODEL_FOLDER PROMPT`
//!
//! Dropping the generation, or its canceller, ends it early. With the feature `futures`, `into_stream()` makes the same a
//! `Stream` for programs that do not block.

use std::io::Write;

use gemma_cuda::{Gemma, LoadOptions, Request, SamplingParams};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [model, prompt] = <[String; 2]>::try_from(std::env::args().skip(1).collect::<Vec<_>>())
        .map_err(|_| "usage: stream MODEL_FOLDER PROMPT")?;
    let gemma = Gemma::load(model, LoadOptions::default())?;
    let sampling = SamplingParams { temperature: Some(0.8), top_p: Some(0.95), seed: Some(7), ..Default::default() };
    for piece in gemma.generate(Request::new(prompt).sampling(sampling).max_new_tokens(64))? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
