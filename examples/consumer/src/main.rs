//! Generates greedily after a prompt of token ids: `consumer MODEL_FOLDER TOKEN...`

use gemma_cuda::{Gemma, Generation, LoadOptions, Request, SamplingParams};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let model = args.next().ok_or("usage: consumer MODEL_FOLDER TOKEN...")?;
    let prompt = args.map(|id| id.parse()).collect::<Result<Vec<u32>, _>>()?;
    let gemma = Gemma::load(model, LoadOptions { device: "reference".into(), ..Default::default() })?;
    let request = Request::new(prompt).sampling(SamplingParams::greedy()).max_new_tokens(8).ignore_eos(true);
    println!("{:?}", gemma.generate(request).and_then(Generation::finish)?.token_ids);
    Ok(())
}
