//! The tests that a GPU machine runs too: one program, so that a bundle for such a machine stays small. They run on
//! GEMMA_CUDA_TEST_DEVICE, such as `cuda:0`, if that is set, as far as the device computes what they ask for.
//! GEMMA_CUDA_TEST_ROOT is where the repository is, if not where it was built.

mod calibrate;
mod golden;
mod real_model;
#[path = "../support/mod.rs"]
mod support;

fn device() -> String {
    std::env::var("GEMMA_CUDA_TEST_DEVICE").unwrap_or_else(|_| "reference".into())
}
