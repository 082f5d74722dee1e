//! Several prompts at once, with the log-probability of every token and of those that were nearly taken:
//! `cargo run --release --example batch -- MODEL_FOLDER PROMPT...`
//!
//! All requests share one running batch, in which nothing is padded; each gets the text it would get alone.

use gemma_cuda::{Gemma, LoadOptions, Request, SamplingParams};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let model = args.next().ok_or("usage: batch MODEL_FOLDER PROMPT...")?;
    let gemma = Gemma::load(model, LoadOptions::default())?;
    let request =
        |prompt: String| Request::new(prompt).sampling(SamplingParams::greedy()).max_new_tokens(8).logprobs(3);
    for generation in gemma.generate_all(args.map(request))? {
        let completion = generation.finish()?;
        println!("{:?}", completion.text);
        for token in completion.logprobs.unwrap_or_default() {
            let others: Vec<String> = token.top.iter().map(|top| format!("{} {:.2}", top.id, top.logprob)).collect();
            println!("  {:>6} {:>7.3}  of {}", token.id, token.logprob, others.join(", "));
        }
    }
    Ok(())
}
