//! The real Gemma 3 270M against values Hugging Face transformers computed in float32. Run `scripts/fetch-model`
//! first; without the model these tests say that they did not run, and fail where `CI` is set.

use std::path::{Path, PathBuf};

use gemma_cuda::checkpoint::Checkpoint;
use gemma_cuda::engine::{DType, Engine, EngineOptions, SamplingConfig, StepItem};
use serde_json::Value;

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path("tests/golden/gemma3_270m").join(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn checkpoint() -> Option<Checkpoint> {
    let dir = path("models/gemma-3-270m");
    if dir.exists() {
        return Some(Checkpoint::open(&dir).unwrap());
    }
    assert!(std::env::var_os("CI").is_none(), "the real model is missing; run scripts/fetch-model");
    eprintln!("\n*** NOT RUN: the real model is missing; run scripts/fetch-model ***\n");
    None
}

fn engine(checkpoint: &Checkpoint, compute: DType) -> Engine {
    let options = EngineOptions {
        device: "reference".into(),
        compute,
        prefix_cache: false,
        max_logit_rows: 1,
        ..Default::default()
    };
    let mut engine = Engine::new(checkpoint.spec(), &options).unwrap();
    for tensor in checkpoint.tensors() {
        engine.load_tensor(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes()).unwrap();
    }
    engine.finish_loading().unwrap();
    engine
}

/// Logits after the last token of the prompt, and the greedy tokens that follow.
fn generate(engine: &mut Engine, prompt: &[u32], new: usize) -> (Vec<f32>, Vec<u32>) {
    let sequence = engine.add_sequence(prompt, prompt.len() as u32, &SamplingConfig::default(), false).unwrap();
    let mut left = prompt.len() as u32 - 1;
    while left > 0 {
        let chunk = left.min(256);
        engine.step(&[StepItem::feed(sequence, chunk)]).unwrap();
        left -= chunk;
    }
    let mut logits = Vec::new();
    let mut tokens = Vec::new();
    for step in 0..new {
        let item = StepItem { sample: true, logits: step == 0, ..StepItem::feed(sequence, 1) };
        let mut output = engine.step(&[item]).unwrap().remove(0);
        if step == 0 {
            logits = std::mem::take(&mut output.logits);
        }
        tokens.push(output.sampled[0].token);
    }
    engine.remove_sequence(sequence).unwrap();
    (logits, tokens)
}

fn last_logits(case: &str) -> Vec<f32> {
    let file = std::fs::read(path("tests/golden/gemma3_270m").join(format!("{case}.logits.safetensors"))).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let bytes = tensors.tensor("last_logits").unwrap().data();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn tokens_are_those_of_the_reference() {
    let Some(checkpoint) = checkpoint() else { return };
    let tokenizer = checkpoint.tokenizer().unwrap();
    for case in json("tokenizer_cases.json").as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        if ids(&case["ids"]).iter().any(|&id| id >= checkpoint.spec().vocab_size) {
            assert!(tokenizer.encode(text, true).is_err(), "{text:?}");
            continue;
        }
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["ids_no_special"]), "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{text:?}");
        let decoded = tokenizer.decode(&ids(&case["ids"])).unwrap();
        assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{text:?}");
        let mut decoder = tokenizer.incremental_decoder();
        let mut streamed: String =
            ids(&case["ids"]).into_iter().map(|id| decoder.push(id).unwrap()).collect::<Vec<_>>().concat();
        streamed.push_str(&decoder.finish().unwrap());
        assert_eq!(streamed, decoded, "{text:?}");
    }
    let refused = tokenizer.encode("<image_soft_token>", true).unwrap_err().to_string();
    assert!(refused.contains("262144"), "{refused}");
}

#[test]
fn float32_gives_the_reference_logits_and_text() {
    let Some(checkpoint) = checkpoint() else { return };
    let mut engine = engine(&checkpoint, DType::F32);
    for case in json("golden.json")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let want = ids(&case["greedy_ids"]);
        let (logits, tokens) = generate(&mut engine, &ids(&case["input_ids"]), want.len());
        let worst = logits.iter().zip(last_logits(name)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name}: max abs {worst:.2e}");
        assert!(worst < 1e-2, "{name}: {worst}");
        assert_eq!(tokens, want, "{name}");
    }
}

#[test]
fn bfloat16_is_as_near_as_the_reference_in_bfloat16() {
    let Some(checkpoint) = checkpoint() else { return };
    let mut engine = engine(&checkpoint, DType::BF16);
    for case in json("golden.json")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (logits, _) = generate(&mut engine, &ids(&case["input_ids"]), 1);
        let want = last_logits(name);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = logits.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
        let relative = (error / want.iter().map(|&x| square(x)).sum::<f64>()).sqrt();
        println!("{name}: relative L2 {relative:.4}");
        assert!(relative < 0.022, "{name}: {relative}");
    }
}
