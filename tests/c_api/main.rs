//! The C API, driven through bindings that bindgen made of its header (`scripts/generate-bindings`), against the golden
//! logits and generations of the tiny models. What it says to wrong calls is tested in C++.
#![allow(unsafe_code)]

#[allow(dead_code, non_camel_case_types, non_upper_case_globals, clippy::all)]
mod bindings;

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use bindings::*;
use safetensors::{Dtype, SafeTensors};

/// Those whose files hold the canonical names, in one file.
const MODELS: [&str; 4] = ["gemma1-gqa-f16", "gemma2-gqa", "gemma2-hd256", "gemma3-mqa"];

fn folder(model: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/golden/tiny", model].iter().collect()
}

struct Engine(*mut gemma_cuda_engine);

// An engine is used by one thread at a time, any thread.
unsafe impl Send for Engine {}

impl Drop for Engine {
    fn drop(&mut self) {
        unsafe { gemma_cuda_engine_destroy(self.0) };
    }
}

fn sentence(engine: *const gemma_cuda_engine) -> String {
    unsafe { CStr::from_ptr(gemma_cuda_last_error(engine)) }.to_string_lossy().into_owned()
}

impl Engine {
    /// In float32 on the CPU.
    fn load(folder: &Path) -> Engine {
        let engine = Engine::create(folder);
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = match tensor.dtype() {
                Dtype::F32 => GEMMA_CUDA_F32,
                Dtype::BF16 => GEMMA_CUDA_BF16,
                Dtype::F16 => GEMMA_CUDA_F16,
                other => panic!("{name} is {other:?}"),
            };
            let name = CString::new(name).unwrap();
            let shape: Vec<u64> = tensor.shape().iter().map(|&extent| extent as u64).collect();
            let (data, size) = (tensor.data().as_ptr().cast::<c_void>(), tensor.data().len());
            engine.check(unsafe {
                gemma_cuda_load_tensor(engine.0, name.as_ptr(), dtype, shape.as_ptr(), shape.len() as u32, data, size)
            });
        }
        engine.check(unsafe { gemma_cuda_finish_loading(engine.0) });
        engine
    }

    fn create(folder: &Path) -> Engine {
        let json = std::fs::read(folder.join("config.json")).unwrap();
        let (mut model, mut engine) = (null_mut(), null_mut());
        unsafe {
            let status = gemma_cuda_model_parse(json.as_ptr().cast::<c_char>(), json.len(), &mut model);
            assert_eq!(status, GEMMA_CUDA_OK as i32, "{}", sentence(null()));
            let mut options: gemma_cuda_options = std::mem::zeroed();
            gemma_cuda_options_init(&mut options);
            options.device = c"reference".as_ptr();
            (options.compute, options.weights, options.page_size) = (GEMMA_CUDA_F32, GEMMA_CUDA_F32, 5);
            options.threads = 2;
            let status = gemma_cuda_engine_create(model, &options, &mut engine);
            gemma_cuda_model_free(model);
            assert_eq!(status, GEMMA_CUDA_OK as i32, "{}", sentence(null()));
        }
        Engine(engine)
    }

    fn check(&self, status: gemma_cuda_status) {
        assert_eq!(status, GEMMA_CUDA_OK as i32, "{}", sentence(self.0));
    }

    fn add(&self, tokens: &[u32]) -> u32 {
        let mut sequence = 0;
        self.check(unsafe {
            gemma_cuda_add_sequence(self.0, tokens.as_ptr(), tokens.len(), tokens.len(), null(), 0, &mut sequence)
        });
        sequence
    }

    fn step(&self, items: &[gemma_cuda_item]) -> Vec<gemma_cuda_output> {
        self.check(unsafe { gemma_cuda_step(self.0, items.as_ptr(), items.len()) });
        let output = |index| unsafe {
            let mut output: gemma_cuda_output = std::mem::zeroed();
            gemma_cuda_output_init(&mut output);
            self.check(gemma_cuda_get_output(self.0, index, &mut output));
            output
        };
        (0..items.len()).map(output).collect()
    }

    fn remove(&self, sequence: u32) {
        self.check(unsafe { gemma_cuda_remove_sequence(self.0, sequence) });
    }
}

struct Prompt {
    ids: Vec<u32>,
    greedy: Vec<u32>,
    /// After every token of the prompt and the generation but its last: `[tokens, vocab_size]`.
    logits: Vec<f32>,
}

fn prompts(folder: &Path) -> Vec<Prompt> {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Option<Vec<u32>> {
        let tensor = file.tensor(name).ok()?;
        Some(tensor.data().as_chunks::<8>().0.iter().map(|id| i64::from_le_bytes(*id) as u32).collect())
    };
    let prompt = |number| {
        let logits = file.tensor(&format!("p{number}.logits")).unwrap();
        Some(Prompt {
            ids: ids(&format!("p{number}.ids"))?,
            greedy: ids(&format!("p{number}.greedy"))?,
            logits: logits.data().as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
        })
    };
    (0..)
        .map_while(
            |number| if file.names().contains(&format!("p{number}.ids").as_str()) { prompt(number) } else { None },
        )
        .collect()
}

fn relative_l2(ours: &[f32], golden: &[f32]) -> f64 {
    assert_eq!(ours.len(), golden.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = ours.iter().zip(golden).map(|(a, b)| square(a - b)).sum();
    (error / golden.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

#[test]
fn logits_are_the_golden_ones() {
    for model in MODELS {
        let engine = Engine::load(&folder(model));
        let prompts = prompts(&folder(model));
        assert!(prompts.len() >= 4);
        for prompt in &prompts {
            let tokens = [&prompt.ids[..], &prompt.greedy[..prompt.greedy.len() - 1]].concat();
            let sequence = engine.add(&tokens);
            let mut logits = Vec::new();
            for chunk in tokens.chunks(60) {
                let item = gemma_cuda_item { sequence, tokens: chunk.len() as u32, flags: GEMMA_CUDA_LOGITS };
                let output = engine.step(&[item])[0];
                logits.extend_from_slice(unsafe { std::slice::from_raw_parts(output.logits, output.logit_count) });
            }
            let distance = relative_l2(&logits, &prompt.logits);
            assert!(distance < 2e-5, "{model}: {distance:.2e}");
            engine.remove(sequence);
        }
    }
}

/// All prompts side by side, and engines in threads of their own.
#[test]
fn generations_are_the_golden_ones() {
    std::thread::scope(|threads| {
        for model in MODELS {
            threads.spawn(move || {
                let (engine, prompts) = (Engine::load(&folder(model)), prompts(&folder(model)));
                let sequences: Vec<u32> = prompts.iter().map(|prompt| engine.add(&prompt.ids)).collect();
                let mut found = vec![Vec::new(); prompts.len()];
                for step in 0..prompts[0].greedy.len() {
                    let items: Vec<gemma_cuda_item> = sequences
                        .iter()
                        .zip(&prompts)
                        .map(|(&sequence, prompt)| gemma_cuda_item {
                            sequence,
                            tokens: if step == 0 { prompt.ids.len() as u32 } else { 1 },
                            flags: GEMMA_CUDA_SAMPLE,
                        })
                        .collect();
                    for (found, output) in found.iter_mut().zip(engine.step(&items)) {
                        assert!(output.failure.is_null());
                        found.push(unsafe { (*output.sampled).token });
                    }
                }
                for (found, prompt) in found.iter().zip(&prompts) {
                    assert_eq!(found, &prompt.greedy, "{model}");
                }
            });
        }
    });
}

/// The same names and shapes as the crate's.
#[test]
fn tensors_are_those_of_the_rust_api() {
    let json = std::fs::read(folder("gemma2-gqa").join("config.json")).unwrap();
    let checkpoint = gemma_cuda::checkpoint::Checkpoint::open(&folder("gemma2-gqa")).unwrap();
    let table = gemma_cuda::engine::tensor_table(checkpoint.spec()).unwrap();
    unsafe {
        let mut model = null_mut();
        assert_eq!(gemma_cuda_model_parse(json.as_ptr().cast(), json.len(), &mut model), GEMMA_CUDA_OK as i32);
        let mut info: gemma_cuda_model_info = std::mem::zeroed();
        gemma_cuda_model_info_init(&mut info);
        assert_eq!(gemma_cuda_model_get_info(model, &mut info), GEMMA_CUDA_OK as i32);
        assert_eq!(info.tensors as usize, table.len());
        for (index, slot) in table.iter().enumerate() {
            let (mut name, mut shape, mut rank) = (null(), null(), 0);
            let status = gemma_cuda_model_tensor(model, index as u32, &mut name, &mut shape, &mut rank);
            assert_eq!(status, GEMMA_CUDA_OK as i32);
            assert_eq!(CStr::from_ptr(name).to_str(), Ok(slot.name.as_str()));
            assert_eq!(std::slice::from_raw_parts(shape, rank as usize), &slot.shape[..]);
        }
        gemma_cuda_model_free(model);
        assert_eq!(CStr::from_ptr(gemma_cuda_version()).to_str(), Ok(env!("CARGO_PKG_VERSION")));
        assert_eq!(gemma_cuda_abi(), GEMMA_CUDA_ABI);
    }
}
