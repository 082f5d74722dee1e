//! Every tiny model against logits, hidden states and greedy generations that Hugging Face transformers computed in
//! float32 with eager attention. What is compared in bfloat16 runs on the device under test.

use gemma_cuda::checkpoint::Checkpoint;
use gemma_cuda::engine::{DType, Engine, EngineOptions, SamplingConfig, StepItem, memory_budget};
use gemma_cuda::verify::{Report, Tolerance, verify};
use gemma_cuda::{ComputeType, LoadOptions};

use crate::device;
use crate::support::golden_dir;

const MODELS: [&str; 11] = [
    "gemma1-gqa-f16",
    "gemma1-legacy-gelu",
    "gemma1-mha",
    "gemma1-mqa",
    "gemma1-sharded",
    "gemma2-gqa",
    "gemma2-hd256",
    "gemma2-untied",
    "gemma3-gqa-ropescale",
    "gemma3-mqa",
    "gemma3-nested",
];

fn report(model: &str, options: LoadOptions) -> Report {
    verify(golden_dir(model), golden_dir(model).join("golden.safetensors"), &options, |_| {}).unwrap()
}

fn assert_within(model: &str, report: &Report, tolerance: Tolerance) {
    let exceeding = report.exceeding(&tolerance);
    assert!(exceeding.is_empty(), "{model}: {exceeding:?}");
}

#[test]
fn float32_is_the_reference_but_for_rounding() {
    for model in MODELS {
        let options = LoadOptions { device: "reference".into(), compute: ComputeType::F32, ..Default::default() };
        let report = report(model, options);
        // Float32 rounding is below 7e-5; the smallest mistake there is to make, exact GELU, shows as 3e-3.
        let tolerance = Tolerance { max_abs: Some(1e-3), argmax: Some(1.0), greedy: true, ..Default::default() };
        assert_within(model, &report, tolerance);
        let hidden = &report.prompts[3].hidden;
        assert!(!hidden.is_empty());
        for layer in hidden {
            assert!(layer.rel_l2 < 1e-5, "{model}: {layer:?}");
        }
    }
}

#[test]
fn bfloat16_is_as_near_as_the_reference_in_bfloat16() {
    for model in MODELS {
        let report = report(model, LoadOptions { device: device(), ..Default::default() });
        println!("{model}: {:?} (the reference in bfloat16: {})", report.logits, reference_noise(model));
        // Where one rounding falls is luck, so the largest of 170 000 differences may be a quarter more than theirs.
        let tolerance = Tolerance { max_abs: Some(1.25 * reference_noise(model)), ..Default::default() };
        assert_within(model, &report, tolerance);
        assert_within(model, &report, Tolerance { rel_l2: Some(0.03), kl: Some(2e-3), ..Default::default() });
    }
}

/// How far transformers in bfloat16 is from itself in float32, on the same prompts.
fn reference_noise(model: &str) -> f64 {
    let file = std::fs::read(golden_dir(model).join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&file).unwrap();
    golden["rounding_noise_max_abs"]["bfloat16"].as_f64().unwrap()
}

/// However prompts are cut into chunks, laid over pages and put together in steps, the logits are the reference's.
#[test]
fn no_cut_changes_the_logits() {
    for model in MODELS {
        let checkpoint = Checkpoint::open(&golden_dir(model)).unwrap();
        let golden = golden_prompts(model);
        let tokens: usize = golden.iter().map(|prompt| prompt.tokens.len()).sum();
        for page_size in [1, 3, 16] {
            let mut engine = engine(&checkpoint, page_size, tokens as u32);
            for prompt in &golden {
                feed_together(&mut engine, std::slice::from_ref(prompt), usize::MAX, model);
            }
            for chunk in [1, 2, 3, 4, 5, 6, 7, usize::MAX] {
                feed_together(&mut engine, &golden, chunk, model);
            }
        }
    }
}

/// Greedy generation in one ragged batch: prompts are fed whole in the first step, then all decode together.
#[test]
fn a_ragged_batch_generates_the_reference_tokens() {
    for model in MODELS {
        let checkpoint = Checkpoint::open(&golden_dir(model)).unwrap();
        let golden = golden_prompts(model);
        let mut engine = engine(&checkpoint, 3, 512);
        let greedy = SamplingConfig::default();
        let mut add = |prompt: &GoldenPrompt| {
            let ids = &prompt.tokens[..prompt.prompt];
            engine.add_sequence(ids, ids.len() as u32, &greedy, false).unwrap()
        };
        let sequences: Vec<u32> = golden.iter().map(&mut add).collect();
        let mut generated = vec![Vec::new(); golden.len()];
        for step in 0..golden[0].greedy.len() {
            let item = |(&sequence, prompt): (&u32, &GoldenPrompt)| {
                let tokens = if step == 0 { prompt.prompt as u32 } else { 1 };
                StepItem { sample: true, ..StepItem::feed(sequence, tokens) }
            };
            let items: Vec<StepItem> = sequences.iter().zip(&golden).map(item).collect();
            for (output, generated) in engine.step(&items).unwrap().iter().zip(&mut generated) {
                generated.push(output.sampled[0].token);
            }
        }
        for (prompt, generated) in golden.iter().zip(&generated) {
            assert_eq!(generated, &prompt.greedy, "{model}, prompt of {}", prompt.prompt);
        }
    }
}

/// Captured steps, steps that are not, and repetitions of both: the same bits.
#[test]
fn captured_steps_and_repetitions_give_the_same_bits() {
    for model in ["gemma1-mha", "gemma2-hd256", "gemma3-mqa"] {
        let checkpoint = Checkpoint::open(&golden_dir(model)).unwrap();
        let golden = golden_prompts(model);
        let mut first = None;
        for graphs in [true, false] {
            let options = EngineOptions { device: device(), graphs, prefix_cache: false, ..Default::default() };
            let mut engine = load(&checkpoint, &options);
            for _ in 0..20 {
                let logits = decode_together(&mut engine, &golden);
                assert!(logits.iter().all(|logit| logit.is_finite()));
                assert!(*first.get_or_insert_with(|| logits.clone()) == logits, "{model}, graphs {graphs}");
            }
        }
    }
}

/// The filling of a padded batch reaches nobody's logits; a product of more rows may round differently, by a few of
/// bfloat16's 2^-8.
#[test]
fn padded_steps_are_within_bfloat16_of_ragged_ones() {
    for model in ["gemma1-mha", "gemma2-hd256", "gemma3-mqa"] {
        let checkpoint = Checkpoint::open(&golden_dir(model)).unwrap();
        let golden = golden_prompts(model);
        let logits = [false, true].map(|padded| {
            let options = EngineOptions {
                device: device(),
                padded,
                max_batch_tokens: 1024,
                max_logit_rows: 1024,
                ..Default::default()
            };
            prefill_together(&mut load(&checkpoint, &options), &golden)
        });
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
        let distance = square(&mut logits[0].iter().zip(&logits[1]).map(|(a, b)| a - b));
        let norm = square(&mut logits[0].iter().copied());
        assert!((distance / norm).sqrt() <= 0.02, "{model}: relative distance {}", (distance / norm).sqrt());
    }
}

/// What the engine reports of itself, on the device.
#[test]
fn captured_steps_and_memory_are_counted() {
    let checkpoint = Checkpoint::open(&golden_dir("gemma3-mqa")).unwrap();
    let options = EngineOptions { device: device(), ..Default::default() };
    let mut engine = load(&checkpoint, &options);
    let fresh = engine.statistics();
    assert_eq!((fresh.steps, fresh.captured_steps, fresh.tokens), (0, 0, 0));
    let budget = memory_budget(checkpoint.spec(), &options).unwrap();
    let planned = budget.weights + budget.kv_cache + budget.activations + budget.logits;
    // Products, attention and staging take some more on a GPU.
    assert!((planned..planned + (1 << 30)).contains(&fresh.memory), "{fresh:?}, planned {planned}");
    decode_together(&mut engine, &golden_prompts("gemma3-mqa"));
    let done = engine.statistics();
    assert_eq!(done.steps, 10);
    assert_eq!(done.captured_steps, if device() == "reference" { 0 } else { 10 });
    let copy = engine.copy_bandwidth().unwrap();
    println!("copies on {} reach {:.0} GB/s; {done:?}", engine.device_name(), copy / 1e9);
    assert!(copy > 1e8);
    assert_eq!(engine.statistics().peak_memory, done.peak_memory);
}

/// The logits of all prompts' tokens, fed side by side in one step.
fn prefill_together(engine: &mut Engine, prompts: &[GoldenPrompt]) -> Vec<f32> {
    let items = prompts.iter().map(|prompt| {
        let tokens = prompt.tokens.len() as u32;
        let sequence = engine.add_sequence(&prompt.tokens, tokens, &SamplingConfig::default(), false).unwrap();
        StepItem { logits: true, ..StepItem::feed(sequence, tokens) }
    });
    let items: Vec<StepItem> = items.collect();
    engine.step(&items).unwrap().into_iter().flat_map(|output| output.logits).collect()
}

/// The logits of ten greedy steps of all prompts side by side, after a first step that feeds the prompts.
fn decode_together(engine: &mut Engine, prompts: &[GoldenPrompt]) -> Vec<f32> {
    let mut add = |prompt: &GoldenPrompt| {
        let ids = &prompt.tokens[..prompt.prompt];
        engine.add_sequence(ids, ids.len() as u32, &SamplingConfig::default(), false).unwrap()
    };
    let sequences: Vec<u32> = prompts.iter().map(&mut add).collect();
    let mut logits = Vec::new();
    for step in 0..10 {
        let item = |(&sequence, prompt): (&u32, &GoldenPrompt)| {
            let tokens = if step == 0 { prompt.prompt as u32 } else { 1 };
            StepItem { sample: true, logits: step > 0, ..StepItem::feed(sequence, tokens) }
        };
        let items: Vec<StepItem> = sequences.iter().zip(prompts).map(item).collect();
        engine.step(&items).unwrap().into_iter().for_each(|output| logits.extend(output.logits));
    }
    sequences.into_iter().for_each(|sequence| engine.remove_sequence(sequence).unwrap());
    logits
}

struct GoldenPrompt {
    /// The prompt and all that was generated after it but the last.
    tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    greedy: Vec<u32>,
    /// `[tokens, VOCAB]`
    logits: Vec<f32>,
}

const VOCAB: usize = 512;

fn golden_prompts(model: &str) -> Vec<GoldenPrompt> {
    let file = std::fs::read(golden_dir(model).join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let ids = |name: String| -> Vec<u32> {
        let (values, _) = tensors.tensor(&name).unwrap().data().as_chunks::<8>();
        values.iter().map(|bytes| i64::from_le_bytes(*bytes) as u32).collect()
    };
    let prompt = |i: usize| {
        let (prompt, greedy) = (ids(format!("p{i}.ids")), ids(format!("p{i}.greedy")));
        let (logits, _) = tensors.tensor(&format!("p{i}.logits")).unwrap().data().as_chunks::<4>();
        let logits = logits.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        GoldenPrompt { tokens: [&prompt, &greedy[..greedy.len() - 1]].concat(), prompt: prompt.len(), greedy, logits }
    };
    (0..8).map(prompt).collect()
}

fn engine(checkpoint: &Checkpoint, page_size: u32, max_batch_tokens: u32) -> Engine {
    assert_eq!(checkpoint.spec().vocab_size as usize, VOCAB);
    let options = EngineOptions {
        device: "reference".into(),
        compute: DType::F32,
        weights: DType::F32,
        page_size,
        pages: 8 * 128 / page_size,
        max_batch_tokens,
        max_sequences: 8,
        max_logit_rows: max_batch_tokens,
        prefix_cache: false,
        ..Default::default()
    };
    load(checkpoint, &options)
}

fn load(checkpoint: &Checkpoint, options: &EngineOptions) -> Engine {
    let mut engine = Engine::new(checkpoint.spec(), options).unwrap();
    for tensor in checkpoint.tensors() {
        engine.load_tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes()).unwrap();
    }
    engine.finish_loading().unwrap();
    engine
}

/// Feeds all prompts side by side, each step the next `chunk` tokens of each, and compares every row.
fn feed_together(engine: &mut Engine, prompts: &[GoldenPrompt], chunk: usize, model: &str) {
    let add = |prompt: &GoldenPrompt| {
        let tokens = &prompt.tokens;
        engine.add_sequence(tokens, tokens.len() as u32, &SamplingConfig::default(), false).unwrap()
    };
    let sequences: Vec<u32> = prompts.iter().map(add).collect();
    let mut fed = vec![0; prompts.len()];
    loop {
        let left = |i: usize| prompts[i].tokens.len() - fed[i];
        let taking: Vec<(usize, usize)> =
            (0..prompts.len()).map(|i| (i, left(i).min(chunk))).filter(|&(_, tokens)| tokens > 0).collect();
        if taking.is_empty() {
            break;
        }
        let item =
            |&(i, tokens): &(usize, usize)| StepItem { logits: true, ..StepItem::feed(sequences[i], tokens as u32) };
        let outputs = engine.step(&taking.iter().map(item).collect::<Vec<_>>()).unwrap();
        for (&(i, tokens), output) in taking.iter().zip(&outputs) {
            let golden = &prompts[i].logits[fed[i] * VOCAB..][..tokens * VOCAB];
            assert_eq!(output.logits.len(), golden.len());
            let near = output.logits.iter().zip(golden).all(|(ours, golden)| (ours - golden).abs() <= 1e-3);
            assert!(near, "{model}: prompt of {}, rows from {} in chunks of {chunk}", prompts[i].prompt, fed[i]);
            fed[i] += tokens;
        }
    }
    sequences.into_iter().for_each(|sequence| engine.remove_sequence(sequence).unwrap());
}
