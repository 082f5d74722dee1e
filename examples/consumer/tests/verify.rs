//! How a project proves, in its own `cargo test`, that its Gemma computes what transformers computes: golden values beside a
//! checkpoint (scripts/make-golden makes them), and `verify`. GOLDEN_MODEL is the folder.

use std::path::PathBuf;

use gemma_cuda::{ComputeType, LoadOptions};
use gemma_cuda::verify::{Tolerance, verify};

#[test]
fn our_gemma_is_right() {
    let Some(model) = std::env::var_os("GOLDEN_MODEL").map(PathBuf::from) else {
        panic!("GOLDEN_MODEL is not set: the folder of a checkpoint with golden.safetensors in it");
    };
    let golden = model.join("golden.safetensors");
    // Where a GPU is: bf16, and `rel_l2: Some(0.03), kl: Some(2e-3), argmax: Some(0.97)`.
    let options = LoadOptions { device: "reference".into(), compute: ComputeType::F32, ..Default::default() };
    let report = verify(&model, golden, &options, |_| {}).unwrap();
    let exceeding = report.exceeding(&Tolerance { max_abs: Some(1e-3), greedy: true, ..Default::default() });
    assert!(exceeding.is_empty(), "{exceeding:?}");
}
