//! The shapes of the published models, as the configs they were published with: for measuring speed without their
//! weights.

use serde_json::{Map, Value, json};

use super::config::Config;
use crate::engine::ModelSpec;
use crate::error::{Error, Result};

struct Shape {
    name: &'static str,
    model_type: &'static str,
    layers: u32,
    hidden: u32,
    ffn: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    query_pre_attn_scalar: Option<u32>,
    window: Option<u32>,
    vocab: u32,
    positions: u32,
}

#[rustfmt::skip]
const SHAPES: [Shape; 10] = [
    shape("gemma-2b", "gemma", [18, 2048, 16384, 8, 1, 256], None, None, 256_000, 8192),
    shape("gemma-7b", "gemma", [28, 3072, 24576, 16, 16, 256], None, None, 256_000, 8192),
    shape("gemma-2-2b", "gemma2", [26, 2304, 9216, 8, 4, 256], Some(256), Some(4096), 256_000, 8192),
    shape("gemma-2-9b", "gemma2", [42, 3584, 14336, 16, 8, 256], Some(256), Some(4096), 256_000, 8192),
    shape("gemma-2-27b", "gemma2", [46, 4608, 36864, 32, 16, 128], Some(144), Some(4096), 256_000, 8192),
    shape("gemma-3-270m", "gemma3_text", [18, 640, 2048, 4, 1, 256], Some(256), Some(512), 262_144, 32768),
    shape("gemma-3-1b", "gemma3_text", [26, 1152, 6912, 4, 1, 256], Some(256), Some(512), 262_144, 32768),
    shape("gemma-3-4b", "gemma3_text", [34, 2560, 10240, 8, 4, 256], Some(256), Some(1024), 262_208, 131_072),
    shape("gemma-3-12b", "gemma3_text", [48, 3840, 15360, 16, 8, 256], Some(256), Some(1024), 262_208, 131_072),
    shape("gemma-3-27b", "gemma3_text", [62, 5376, 21504, 32, 16, 128], Some(168), Some(1024), 262_208, 131_072),
];

const fn shape(
    name: &'static str,
    model_type: &'static str,
    [layers, hidden, ffn, heads, kv_heads, head_dim]: [u32; 6],
    query_pre_attn_scalar: Option<u32>,
    window: Option<u32>,
    vocab: u32,
    positions: u32,
) -> Shape {
    Shape {
        name,
        model_type,
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        query_pre_attn_scalar,
        window,
        vocab,
        positions,
    }
}

/// The model of a published name, such as `gemma-7b`.
///
/// # Errors
/// [`Error::InvalidArgument`] lists the names there are.
pub fn named_shape(name: &str) -> Result<ModelSpec> {
    let shape = SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
        let known = SHAPES.map(|shape| shape.name).join(", ");
        Error::InvalidArgument(format!("no model is named {name:?}; there are {known}"))
    })?;
    Ok(Config::parse(name.as_ref(), &config(shape))?.spec)
}

fn config(shape: &Shape) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |name: &str, value: Value| map.insert(name.to_owned(), value);
    set("model_type", json!(shape.model_type));
    set("num_hidden_layers", json!(shape.layers));
    set("hidden_size", json!(shape.hidden));
    set("intermediate_size", json!(shape.ffn));
    set("num_attention_heads", json!(shape.heads));
    set("num_key_value_heads", json!(shape.kv_heads));
    set("head_dim", json!(shape.head_dim));
    set("vocab_size", json!(shape.vocab));
    set("max_position_embeddings", json!(shape.positions));
    if let Some(scalar) = shape.query_pre_attn_scalar {
        set("query_pre_attn_scalar", json!(scalar));
    }
    if let Some(window) = shape.window {
        set("sliding_window", json!(window));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_model() {
        for shape in &SHAPES {
            let spec = named_shape(shape.name).unwrap();
            assert_eq!(spec.layers.len(), shape.layers as usize);
            let windows = spec.layers.iter().filter(|layer| layer.window != 0).count();
            let expected = match shape.model_type {
                "gemma" => 0,
                "gemma2" => spec.layers.len() / 2,
                _ => spec.layers.len() - spec.layers.len() / 6,
            };
            assert_eq!(windows, expected, "{}", shape.name);
        }
        assert!(named_shape("gemma-8b").unwrap_err().to_string().contains("gemma-7b"));
    }
}
