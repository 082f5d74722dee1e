//! One prompt, one text: `cargo run --release --example one_shot -- MODEL_FOLDER PROMPT`

use gemma_cuda::{Gemma, Generation, LoadOptions, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [model, prompt] = <[String; 2]>::try_from(std::env::args().skip(1).collect::<Vec<_>>())
        .map_err(|_| "usage: one_shot MODEL_FOLDER PROMPT")?;
    let gemma = Gemma::load(model, LoadOptions::default())?;
    let completion = gemma.generate(Request::new(prompt).max_new_tokens(48)).and_then(Generation::finish)?;
    println!("{}", completion.text);
    eprintln!("{} tokens, ended by {:?}", completion.token_ids.len(), completion.finish_reason);
    Ok(())
}
