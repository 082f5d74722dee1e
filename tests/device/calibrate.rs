//! From a text to an FP8 checkpoint and back, on a tiny model with random weights.

use std::path::Path;

use gemma_cuda::calibrate::{
    CacheType, Method, Recipe, RecipeKind, Statistics, TextFormat, gather, sequences, write_checkpoint,
};
use gemma_cuda::checkpoint::Checkpoint;
use gemma_cuda::engine::{DType, Scheme};
use gemma_cuda::eval::compare;
use gemma_cuda::{Error, Gemma, Generation, LoadOptions, Request};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device, support};

const TEXT: &str = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my \
                    purse, and nothing particular to interest me on shore, I thought I would sail about a little.";

fn options() -> LoadOptions {
    LoadOptions { device: device(), threads: 2, max_batch_tokens: 64, ..Default::default() }
}

fn model() -> (TempDir, Checkpoint) {
    let dir = support::model_with_text();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn text(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn cut(checkpoint: &Checkpoint, window: usize) -> Vec<Vec<u32>> {
    let dir = tempfile::tempdir().unwrap();
    sequences(checkpoint, &text(dir.path(), "text", TEXT), TextFormat::Plain, window, None).unwrap()
}

fn statistics(checkpoint: &Checkpoint) -> Statistics {
    gather(checkpoint, &options(), &cut(checkpoint, 40), None, |_, _| {}).unwrap()
}

fn message(result: Result<impl Sized, Error>) -> String {
    match result {
        Ok(_) => panic!("this should have failed"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_text_is_cut_into_windows() {
    let (_dir, checkpoint) = model();
    let dir = tempfile::tempdir().unwrap();
    let cut = cut(&checkpoint, 40);
    assert!(cut.iter().all(|sequence| sequence[0] == 2 && sequence.len() <= 40));
    assert_eq!(cut.iter().map(|sequence| sequence.len() - 1).sum::<usize>(), TEXT.len());

    let lines = text(dir.path(), "lines.jsonl", "{\"text\": \"abc\"}\n\n{\"text\": \"de\", \"more\": 1}\n");
    assert_eq!(TextFormat::of(&lines), TextFormat::JsonLines);
    let two = sequences(&checkpoint, &lines, TextFormat::JsonLines, 40, None).unwrap();
    assert_eq!(two.iter().map(Vec::len).collect::<Vec<_>>(), [4, 3]);

    let few = text(dir.path(), "few", TEXT);
    let some = sequences(&checkpoint, &few, TextFormat::Plain, 40, Some(50)).unwrap();
    assert_eq!(some.iter().map(Vec::len).sum::<usize>(), 50);

    let refused = |name: &str, content: &[u8], format, most| {
        message(sequences(&checkpoint, &text(dir.path(), name, content), format, 40, most))
    };
    assert!(refused("empty", b"", TextFormat::Plain, None).contains("holds no text"));
    assert!(refused("latin1", b"caf\xe9", TextFormat::Plain, None).contains("not valid UTF-8 (byte 3)"));
    assert!(refused("binary", b"ab\0c", TextFormat::Plain, None).contains("byte 2 is zero"));
    assert!(refused("short", b"abc", TextFormat::Plain, Some(1000)).contains("fewer than the 1000 asked for"));
    assert!(refused("x.jsonl", b"{\"text\": \"a\"}\n{\"txt\": 1}", TextFormat::JsonLines, None).contains("line 2"));
}

#[test]
fn scales_do_not_depend_on_batches_order_or_interruptions() {
    let (_dir, checkpoint) = model();
    let once = statistics(&checkpoint);
    assert!(once.is_complete() && once.tokens() as usize > TEXT.len());
    let of = |statistics: &Statistics| {
        statistics.tensors().map(|(name, found)| (name.to_owned(), found.clone())).collect::<Vec<_>>()
    };
    let mut backwards = cut(&checkpoint, 40);
    backwards.reverse();
    let small = LoadOptions { max_batch_tokens: 7, max_sequences: 2, ..options() };
    assert_eq!(of(&gather(&checkpoint, &small, &backwards, None, |_, _| {}).unwrap()), of(&once));

    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let all = cut(&checkpoint, 40);
    let kept = gather(&checkpoint, &small, &all, Some(&state), |_, _| {}).unwrap();
    assert_eq!(of(&kept), of(&once));
    let mut calls = Vec::new();
    let again = gather(&checkpoint, &options(), &all, Some(&state), |done, all| calls.push((done, all))).unwrap();
    assert_eq!((of(&again), calls.len()), (of(&once), 1)); // nothing was computed
    assert_eq!(Statistics::read(&state).unwrap(), again);
    let other = cut(&checkpoint, 20);
    assert!(message(gather(&checkpoint, &options(), &other, Some(&state), |_, _| {})).contains("another model, text"));
}

#[test]
fn what_is_written_loads_and_is_near_the_original() {
    let (_dir, checkpoint) = model();
    let statistics = statistics(&checkpoint);
    let dir = tempfile::tempdir().unwrap();
    let recipes = [
        (RecipeKind::Static, CacheType::Bf16, false),
        (RecipeKind::Static, CacheType::Fp8, true),
        (RecipeKind::Channel, CacheType::Fp8Tensor, true),
        (RecipeKind::Channel, CacheType::Bf16, false),
    ];
    let mut written = Vec::new();
    for (number, (kind, cache, fp8_lm_head)) in recipes.into_iter().enumerate() {
        let recipe = Recipe { kind, cache, fp8_lm_head, keep: vec![1], ..Recipe::default() };
        let out = dir.path().join(format!("fp8-{number}"));
        let mut last = (0, 1);
        write_checkpoint(&checkpoint, Some(&statistics), &recipe, &out, |done, all| last = (done, all)).unwrap();
        assert_eq!(last.0, last.1);
        assert!(out.join("tokenizer.json").exists() && out.join("generation_config.json").exists());

        let found = Checkpoint::open(&out).unwrap();
        found.check_weights().unwrap();
        let scheme = if kind == RecipeKind::Static { Scheme::Fp8Static } else { Scheme::Fp8Dynamic };
        let (first, second) = (&found.spec().layers[0], &found.spec().layers[1]);
        assert_eq!((first.qkv, first.down, second.qkv, second.down), (scheme, scheme, Scheme::Plain, Scheme::Plain));
        assert_eq!(first.fp8_cache, cache != CacheType::Bf16);
        assert_eq!(found.spec().lm_head, if fp8_lm_head { scheme } else { Scheme::Plain });
        assert!(found.is_quantized() && !checkpoint.is_quantized());
        let fp8 = found.tensors().filter(|tensor| tensor.dtype() == DType::E4M3).count();
        assert_eq!(fp8, 7 * (found.spec().layers.len() - 1) + usize::from(fp8_lm_head));
        written.push(found);

        let model = Gemma::load(&out, options()).unwrap();
        let request = Request::new(vec![2, 5, 9]).max_new_tokens(8).ignore_eos(true);
        assert_eq!(model.generate(request).and_then(Generation::finish).unwrap().token_ids.len(), 8);
    }
    let tokens: Vec<u32> = (0..150).map(|i| 3 + i * 7 % 500).collect();
    let quality = compare(&checkpoint, &written, &options(), 2, &tokens, 40, |_, _| {}).unwrap();
    assert_eq!((quality[0].mean_kl, quality[0].top1), (0.0, 1.0));
    let base = quality[0].perplexity;
    for quality in &quality[1..] {
        // random weights are less forgiving than trained ones
        assert!(quality.mean_kl > 0.0 && quality.mean_kl < 0.3, "{quality:?}");
        assert!((quality.perplexity / base - 1.0).abs() < 0.15, "{quality:?}");
    }
}

#[test]
fn fused_matrices_share_their_scales() {
    let (_dir, checkpoint) = model();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("fp8");
    write_checkpoint(&checkpoint, Some(&statistics(&checkpoint)), &Recipe::default(), &out, |_, _| {}).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    let scale = |name: &str| {
        let tensor = written.tensors().find(|tensor| tensor.name() == name).unwrap();
        f32::from_le_bytes(tensor.bytes().try_into().unwrap())
    };
    for layer in 0..written.spec().layers.len() {
        for kind in ["weight_scale", "input_scale"] {
            let of = |module: &str| scale(&format!("model.layers.{layer}.{module}.{kind}"));
            assert_eq!(of("self_attn.q_proj"), of("self_attn.k_proj"));
            assert_eq!(of("self_attn.q_proj"), of("self_attn.v_proj"));
            assert_eq!(of("mlp.gate_proj"), of("mlp.up_proj"));
            assert_ne!(of("mlp.gate_proj"), of("mlp.down_proj"));
        }
    }
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "compressed-tensors");
    assert_eq!(quantization["config_groups"]["group_0"]["input_activations"]["dynamic"], false);
    assert_eq!(quantization["ignore"], serde_json::json!(["lm_head"]));
}

#[test]
fn nothing_half_written_stays() {
    let (source, checkpoint) = model();
    let statistics = statistics(&checkpoint);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("fp8");
    let write = |statistics: Option<&Statistics>, recipe: &Recipe| {
        write_checkpoint(&checkpoint, statistics, recipe, &out, |_, _| {})
    };
    assert!(message(write(None, &Recipe::default())).contains("calibration must find first"));
    let kept = Recipe { keep: vec![99], ..Recipe::default() };
    assert!(message(write(Some(&statistics), &kept)).contains("there is no layer 99"));
    std::fs::create_dir(&out).unwrap();
    assert!(message(write(Some(&statistics), &Recipe::default())).contains("is there already"));
    std::fs::remove_dir(&out).unwrap();

    // A source file that cannot be copied.
    std::os::unix::fs::symlink(source.path().join("nowhere"), source.path().join("special_tokens_map.json")).unwrap();
    std::fs::create_dir(source.path().join("folder")).unwrap();
    write(Some(&statistics), &Recipe::default()).unwrap(); // what is no file is left out
    std::fs::remove_dir_all(&out).unwrap();
    let full = Path::new("/dev/full/fp8");
    assert!(write_checkpoint(&checkpoint, Some(&statistics), &Recipe::default(), full, |_, _| {}).is_err());

    let one = Recipe { method: Method::One, ..Recipe::default() };
    write(None, &one).unwrap();
    let quantized = Checkpoint::open(&out).unwrap();
    let again = dir.path().join("again");
    let twice = write_checkpoint(&quantized, Some(&statistics), &one, &again, |_, _| {});
    assert!(message(twice).contains("is quantized already"));
    assert!(message(gather(&quantized, &options(), &[vec![2, 3]], None, |_, _| {})).contains("is quantized already"));
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["fp8"]);
}

#[test]
fn a_damaged_fp8_checkpoint_is_refused_by_name() {
    let (_dir, checkpoint) = model();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("fp8");
    let recipe = Recipe { cache: CacheType::Fp8, ..Recipe::default() };
    write_checkpoint(&checkpoint, Some(&statistics(&checkpoint)), &recipe, &out, |_, _| {}).unwrap();
    let path = out.join("config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut changed = config.clone();
        change(&mut changed["quantization_config"]);
        std::fs::write(&path, changed.to_string()).unwrap();
        message(Checkpoint::open(&out))
    };
    // Scales that nothing would use.
    assert!(refused(&|q| q["kv_cache_scheme"] = Value::Null).contains("k_scale"));
    assert!(
        refused(&|q| q["ignore"] = serde_json::json!(["lm_head", "re:.*down_proj"])).contains("down_proj.input_scale")
    );
    assert!(refused(&|q| q["quant_method"] = "awq".into()).contains("awq"));
    // And scales that are not there.
    let dynamic = serde_json::json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true});
    assert!(refused(&|q| q["config_groups"]["group_0"]["input_activations"] = dynamic.clone()).contains("input_scale"));
}
