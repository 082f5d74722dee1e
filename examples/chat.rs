//! A conversation, line by line, with the checkpoint's own template: `cargo run --release --example chat -- MODEL_FOLDER`
//!
//! What was said before stays in the cache: each turn computes only what is new.

use std::io::{BufRead, Write};

use gemma_cuda::checkpoint::Message;
use gemma_cuda::{Gemma, LoadOptions, Prompt, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("usage: chat MODEL_FOLDER")?;
    let gemma = Gemma::load(model, LoadOptions::default())?;
    let mut conversation = Vec::new();
    for line in std::io::stdin().lock().lines() {
        conversation.push(Message::user(line?));
        let mut generation = gemma.generate(Request::new(Prompt::Chat(conversation.clone())).max_new_tokens(256))?;
        for piece in &mut generation {
            print!("{}", piece?.text);
            std::io::stdout().flush()?;
        }
        println!();
        conversation.push(Message::model(generation.finish()?.text));
    }
    Ok(())
}
