//! Damaged checkpoints: an error that names the thing, never a panic, and no more memory than the files justify.

use std::path::Path;

use gemma_cuda::checkpoint::Checkpoint;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden(case: &str) -> std::path::PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/golden/tiny", case].iter().collect()
}

fn copy(case: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(case)).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_string_lossy().starts_with("golden") {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    dir
}

fn refused(dir: &Path, named: &str) {
    let message = Checkpoint::open(dir).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(message.contains(named), "expected {named:?} in {message:?}");
}

/// Rewrites the header of `model.safetensors`; the data stays.
fn with_header(dir: &Path, change: impl FnOnce(String) -> String) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(&bytes[8 + length..]);
    std::fs::write(path, out).unwrap();
}

fn with_json_header(dir: &Path, change: impl FnOnce(&mut Value)) {
    with_header(dir, |header| {
        let mut value = serde_json::from_str(&header).unwrap();
        change(&mut value);
        value.to_string()
    });
}

#[test]
fn both_spellings_of_every_config_mean_the_same_model() {
    for entry in std::fs::read_dir(golden("")).unwrap() {
        let case = entry.unwrap().file_name().into_string().unwrap();
        let newer = golden(&case).join("config.transformers5.json");
        if !newer.exists() {
            continue;
        }
        let dir = copy(&case);
        let old = Checkpoint::open(dir.path()).unwrap().spec().clone();
        std::fs::copy(newer, dir.path().join("config.json")).unwrap();
        assert_eq!(*Checkpoint::open(dir.path()).unwrap().spec(), old, "{case}");
    }
}

#[test]
fn files_that_are_not_there() {
    let dir = copy("gemma3-mqa");
    refused(&dir.path().join("nothing"), "does not exist");
    refused(&dir.path().join("config.json"), "is not a folder");
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), "model.safetensors");
    std::fs::write(dir.path().join("config.json"), "{\"model_type\":").unwrap();
    refused(dir.path(), "not valid JSON");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), "config.json");
}

#[test]
fn shards_and_their_index() {
    let index = |dir: &TempDir| dir.path().join("model.safetensors.index.json");
    let change = |dir: &TempDir, change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&std::fs::read(index(dir)).unwrap()).unwrap();
        change(&mut value["weight_map"]);
        std::fs::write(index(dir), value.to_string()).unwrap();
    };
    let dir = copy("gemma1-sharded");
    assert!(Checkpoint::open(dir.path()).is_ok());
    change(&dir, &|map| map["model.norm.weight"] = json!("../model-00001-of-00002.safetensors"));
    refused(dir.path(), "beside the index");
    change(&dir, &|map| map["model.norm.weight"] = json!("model-00001-of-00002.safetensors"));
    refused(dir.path(), "model.norm.weight");
    let dir = copy("gemma1-sharded");
    change(&dir, &|map| map["model.extra.weight"] = json!("model-00001-of-00002.safetensors"));
    refused(dir.path(), "model.extra.weight");
    let dir = copy("gemma1-sharded");
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    refused(dir.path(), "model-00002-of-00002.safetensors");
}

#[test]
fn headers_that_lie() {
    let name = "model.norm.weight";
    let dir = copy("gemma3-mqa");
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    refused(dir.path(), "not a valid safetensors");
    std::fs::write(&path, &whole[..5]).unwrap();
    refused(dir.path(), "not a valid safetensors");
    std::fs::write(&path, []).unwrap();
    refused(dir.path(), "empty");
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, huge).unwrap();
    refused(dir.path(), "not a valid safetensors");

    let changed = |change: &dyn Fn(&mut Value), named: &str| {
        std::fs::write(&path, &whole).unwrap();
        with_json_header(dir.path(), change);
        refused(dir.path(), named);
    };
    changed(&|header| header[name]["data_offsets"] = json!([0, 192]), "not a valid safetensors");
    changed(&|header| header[name]["shape"] = json!([48, 2]), "[48, 2], the model wants [96]");
    changed(&|header| header[name]["dtype"] = json!("I16"), "model.norm.weight is I16");
    let rename = |from: &'static str, to: &'static str| {
        move |header: &mut Value| {
            let moved = header.as_object_mut().unwrap().remove(from).unwrap();
            header[to] = moved;
        }
    };
    changed(&rename(name, "model.other.weight"), "model.other.weight [96] is not one of");
    changed(&rename(name, "vision_tower.norm"), "model.norm.weight [96] is missing");
    changed(&rename(name, "language_model.model.layers.0.input_layernorm.weight"), "is also there as");
    std::fs::write(&path, &whole).unwrap();
    with_header(dir.path(), |header| {
        let value: Value = serde_json::from_str(&header).unwrap();
        format!("{{\"{name}\":{},{}", value[name], &header[1..])
    });
    refused(dir.path(), "model.norm.weight twice");
}

#[test]
fn weights_that_are_not_numbers_are_found_by_name() {
    let dir = copy("gemma3-mqa");
    let path = dir.path().join("model.safetensors");
    assert!(Checkpoint::open(dir.path()).unwrap().check_weights().is_ok());
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let last = checkpoint.tensors().last().unwrap().name().to_owned();
    let message = checkpoint.check_weights().unwrap_err().to_string();
    assert!(message.contains(&last) && message.contains("NaN"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn mutated_headers_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let dir = copy("gemma1-mqa");
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        bytes[at.index(header)] = byte;
        std::fs::write(&path, bytes).unwrap();
        let _ = Checkpoint::open(dir.path());
    }

    #[test]
    fn mutated_configs_never_panic(at in any::<prop::sample::Index>(), text in "[0-9eE.\\-\"{}\\[\\]a-z,:]{0,12}") {
        let dir = copy("gemma3-nested");
        let path = dir.path().join("config.json");
        let mut config = std::fs::read_to_string(&path).unwrap();
        let at = at.index(config.len());
        config.replace_range(at..(at + text.len() / 2).min(config.len()), &text);
        std::fs::write(&path, config).unwrap();
        let _ = Checkpoint::open(dir.path());
    }
}
