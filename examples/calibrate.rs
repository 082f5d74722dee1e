//! An FP8 checkpoint of a bf16 one: `cargo run --release --example calibrate -- MODEL_FOLDER TEXT_FILE NEW_FOLDER`

use std::path::Path;

use gemma_cuda::LoadOptions;
use gemma_cuda::calibrate::{CacheType, Recipe, TextFormat, gather, sequences, write_checkpoint};
use gemma_cuda::checkpoint::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [model, text, out] = <[String; 3]>::try_from(std::env::args().skip(1).collect::<Vec<_>>())
        .map_err(|_| "usage: calibrate MODEL_FOLDER TEXT_FILE NEW_FOLDER")?;
    let checkpoint = Checkpoint::open(Path::new(&model))?;
    let text = Path::new(&text);
    let windows = sequences(&checkpoint, text, TextFormat::of(text), 512, None)?;
    let statistics = gather(&checkpoint, &LoadOptions::default(), &windows, None, |done, all| {
        eprint!("\r{done} of {all} tokens");
    })?;
    eprintln!();
    for (name, found) in statistics.tensors().filter(|(name, _)| name.starts_with("model.layers.0.")) {
        println!("{name}: the largest of {:?}, 99.9 % below {}", found.largest(), found.percentile(99.9));
    }
    let recipe = Recipe { cache: CacheType::Fp8, ..Recipe::default() };
    write_checkpoint(&checkpoint, Some(&statistics), &recipe, Path::new(&out), |_, _| {})?;
    println!("wrote {out}");
    Ok(())
}
