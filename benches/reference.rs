//! The real Gemma 3 270M on the reference backend in bf16: prefill of 256 tokens and decode, in tokens a second.
//! Needs `scripts/fetch-model`. `benches/hf_cpu_baseline.py` times Hugging Face transformers on the same.

use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gemma_cuda::checkpoint::Checkpoint;
use gemma_cuda::engine::{Engine, EngineOptions, SamplingConfig, StepItem};

const PREFILL: u32 = 256;
const DECODE: u32 = 16;

fn engine() -> Option<Engine> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/gemma-3-270m");
    if !dir.exists() {
        eprintln!("the real model is missing; run scripts/fetch-model");
        return None;
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let options = EngineOptions { device: "reference".into(), prefix_cache: false, ..Default::default() };
    let mut engine = Engine::new(checkpoint.spec(), &options).unwrap();
    for tensor in checkpoint.tensors() {
        engine.load_tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes()).unwrap();
    }
    engine.finish_loading().unwrap();
    Some(engine)
}

/// The time of prefill, and of decode after it.
fn run(engine: &mut Engine, prompt: u32, new: u32) -> (Duration, Duration) {
    let tokens: Vec<u32> = (0..prompt).map(|i| 1000 + i * 37 % 50_000).collect();
    let sequence = engine.add_sequence(&tokens, prompt, &SamplingConfig::default(), false).unwrap();
    let start = Instant::now();
    engine.step(&[StepItem { sample: true, ..StepItem::feed(sequence, prompt) }]).unwrap();
    let prefill = start.elapsed();
    let start = Instant::now();
    for _ in 0..new {
        engine.step(&[StepItem { sample: true, ..StepItem::feed(sequence, 1) }]).unwrap();
    }
    let decode = start.elapsed();
    engine.remove_sequence(sequence).unwrap();
    (prefill, decode)
}

fn reference(criterion: &mut Criterion) {
    let Some(mut engine) = engine() else { return };
    let mut group = criterion.benchmark_group("gemma-3-270m bf16, reference");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    group.throughput(Throughput::Elements(PREFILL.into()));
    group.bench_function("prefill 256", |bencher| {
        bencher.iter_custom(|times| (0..times).map(|_| run(&mut engine, PREFILL, 0).0).sum())
    });
    group.throughput(Throughput::Elements(DECODE.into()));
    group.bench_function("decode", |bencher| {
        bencher.iter_custom(|times| (0..times).map(|_| run(&mut engine, 16, DECODE).1).sum())
    });
    group.finish();
}

criterion_group!(benches, reference);
criterion_main!(benches);
