//! One line of the table: a workload run on a loaded model.

use std::time::{Duration, Instant};

use anyhow::Result;
use gemma_cuda::Gemma;
use gemma_cuda::engine::EngineStatistics;
use serde::Serialize;

use super::workload::{Lengths, Workload, greedy, prompt};

/// How requests come to the model.
#[derive(Clone, Copy)]
pub struct Plan {
    pub most_new: usize,
    pub repeat: u32,
    /// Requests that are computed together, where the next come only when all of them have ended.
    pub batches_of: Option<usize>,
}

/// What was measured, in units of its own. Rates are of the fastest run.
#[derive(Serialize)]
pub struct Figures {
    pub requests: usize,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub seconds: f64,
    /// Of prompts where nothing but prompts is computed; else generated ones.
    pub tokens_per_second: f64,
    pub steps: u64,
    /// Those that replayed a captured graph.
    pub captured_steps: u64,
    /// Bytes that the steps had to read at least: weights once a step, and the keys and values in use.
    pub gb_per_second: f64,
    /// The device's own copies, read and written.
    pub copy_gb_per_second: f64,
    pub share_of_copy: f64,
    /// Of products with weights.
    pub tflops: f64,
    /// Allocated on the device, up to now.
    pub peak_memory_bytes: u64,
    /// FNV-1a over all generated tokens, request by request.
    pub tokens_hash: String,
}

/// A workload's run, and its tokens, request by request.
pub struct Measured {
    pub figures: Figures,
    pub tokens: Vec<Vec<u32>>,
}

struct Run {
    time: Duration,
    statistics: EngineStatistics,
    tokens: Vec<Vec<u32>>,
}

const WARM_UP_TOKENS: usize = 8;

/// `copy` is the device's copy bandwidth in bytes a second.
pub fn measure(model: &Gemma, workload: Workload, plan: Plan, copy: f64) -> Result<Measured> {
    let requests = workload.requests(plan.most_new);
    run(model, &workload.requests(plan.most_new.min(WARM_UP_TOKENS)), plan.batches_of)?;
    let mut best = run(model, &requests, plan.batches_of)?;
    for _ in 1..plan.repeat {
        let again = run(model, &requests, plan.batches_of)?;
        if again.time < best.time {
            best = again;
        }
    }
    let Run { time, statistics, tokens } = best;
    let seconds = time.as_secs_f64();
    let prompt_tokens: usize = requests.iter().map(|request| request.prompt).sum();
    let new_tokens: usize = requests.iter().map(|request| request.new).sum();
    let counted = if workload == Workload::Prefill { prompt_tokens } else { new_tokens };
    let read = statistics.bytes_read as f64 / seconds;
    let figures = Figures {
        requests: requests.len(),
        prompt_tokens,
        new_tokens,
        seconds,
        tokens_per_second: counted as f64 / seconds,
        steps: statistics.steps,
        captured_steps: statistics.captured_steps,
        gb_per_second: read / 1e9,
        copy_gb_per_second: copy / 1e9,
        share_of_copy: read / copy,
        tflops: statistics.flops as f64 / seconds / 1e12,
        peak_memory_bytes: statistics.peak_memory,
        tokens_hash: hash(&tokens),
    };
    Ok(Measured { figures, tokens })
}

fn run(model: &Gemma, requests: &[Lengths], batches_of: Option<usize>) -> Result<Run> {
    let vocab = model.spec().vocab_size;
    let all: Vec<_> = requests.iter().enumerate().map(|(i, r)| greedy(prompt(i, r.prompt, vocab), r.new)).collect();
    let before = model.statistics()?;
    let mut tokens = Vec::new();
    let start = Instant::now();
    for batch in all.chunks(batches_of.unwrap_or(all.len()).max(1)) {
        for generation in model.generate_all(batch.iter().cloned())? {
            tokens.push(generation.finish()?.token_ids);
        }
    }
    let time = start.elapsed();
    Ok(Run { time, statistics: model.statistics()?.since(&before), tokens })
}

fn hash(tokens: &[Vec<u32>]) -> String {
    let hash = tokens
        .iter()
        .flatten()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &id| (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_of_the_tokens_in_their_order() {
        assert_eq!(hash(&[]), "cbf29ce484222325");
        assert_eq!(hash(&[vec![1], vec![2, 3]]), hash(&[vec![1, 2, 3]]));
        assert_ne!(hash(&[vec![1, 2]]), hash(&[vec![2, 1]]));
    }
}
