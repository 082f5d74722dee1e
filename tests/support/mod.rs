//! Tiny checkpoints for the tests.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

pub const MODEL: &str = "gemma2-gqa";

/// In this repository, or where GEMMA_CUDA_TEST_ROOT says, for tests that run without it.
pub fn path(relative: &str) -> PathBuf {
    let root = std::env::var("GEMMA_CUDA_TEST_ROOT").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join(relative)
}

pub fn golden_dir(name: &str) -> PathBuf {
    path("tests/golden/tiny").join(name)
}

/// The tiny model with its `config.json` changed.
pub fn model_with(change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = golden_dir(MODEL);
    for name in ["model.safetensors", "generation_config.json"] {
        std::fs::copy(source.join(name), dir.path().join(name)).unwrap();
    }
    let mut config = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    write_json(dir.path(), "config.json", &config);
    dir
}

/// The tiny model with a tokenizer of bytes (tokens 3 to 258) and Chinese characters (259 to 511), and a chat template.
pub fn model_with_text() -> TempDir {
    let dir = model_with(|_| {});
    let special = ["<pad>", "<eos>", "<bos>"];
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let characters = (0x4e00..).filter_map(char::from_u32).map(String::from);
    let tokens = special.map(String::from).into_iter().chain(bytes).chain(characters).take(512);
    let vocab: serde_json::Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = special.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    let bos = json!({"SpecialToken": {"id": "<bos>", "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence("A")],
            "pair": [bos, sequence("A"), sequence("B")],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": [],
        },
    });
    write_json(dir.path(), "tokenizer.json", &tokenizer);
    let template = "{{ bos_token }}{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};\
                    {% endfor %}{% if add_generation_prompt %}m:{% endif %}";
    let config = json!({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template});
    write_json(dir.path(), "tokenizer_config.json", &config);
    dir
}

fn write_json(dir: &Path, name: &str, value: &Value) {
    std::fs::write(dir.join(name), value.to_string()).unwrap();
}
