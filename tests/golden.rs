//! Every tiny model against logits, hidden states and greedy generations that Hugging Face transformers computed in
//! float32 with eager attention.

use std::path::PathBuf;

use gemma_cuda::verify::{Report, Tolerance, verify};
use gemma_cuda::{ComputeType, LoadOptions};

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

fn dir(model: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/golden/tiny", model].iter().collect()
}

fn report(model: &str, options: LoadOptions) -> Report {
    verify(dir(model), dir(model).join("golden.safetensors"), &options, |_| {}).unwrap()
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
        let report = report(model, LoadOptions { device: "reference".into(), ..Default::default() });
        // Where one rounding falls is luck, so the largest of 170 000 differences may be a quarter more than theirs.
        let tolerance = Tolerance { max_abs: Some(1.25 * reference_noise(model)), ..Default::default() };
        assert_within(model, &report, tolerance);
        assert_within(model, &report, Tolerance { rel_l2: Some(0.03), kl: Some(2e-3), ..Default::default() });
    }
}

/// How far transformers in bfloat16 is from itself in float32, on the same prompts.
fn reference_noise(model: &str) -> f64 {
    let file = std::fs::read(dir(model).join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&file).unwrap();
    golden["rounding_noise_max_abs"]["bfloat16"].as_f64().unwrap()
}

#[test]
fn small_pages_and_chunks_change_nothing() {
    let chunks = LoadOptions {
        device: "reference".into(),
        compute: ComputeType::F32,
        page_size: 3,
        max_batch_tokens: 5,
        max_sequences: 2,
        max_logit_rows: 5,
        ..Default::default()
    };
    for model in MODELS {
        let tolerance = Tolerance { max_abs: Some(1e-3), greedy: true, ..Default::default() };
        assert_within(model, &report(model, chunks.clone()), tolerance);
    }
}
