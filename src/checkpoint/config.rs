//! `config.json`: the core makes a [`ModelSpec`] of it; ids of tokens and how it was quantized are read here.

use std::path::Path;

use serde_json::{Map, Value};

use super::fields::{Fields, read_object};
use super::quantization::Quantization;
use crate::engine::{ModelSpec, parse_config};
use crate::error::{Error, Result};

/// What `config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    pub spec: ModelSpec,
    /// Whether the file gives the vocabulary's size; a nested Gemma 3 config may leave it to the embedding's rows.
    pub vocab_given: bool,
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    /// Whether it says how the checkpoint was quantized.
    pub quantized: bool,
}

impl Config {
    /// Of the folder `dir`: its `config.json`, and `hf_quant_config.json`, where ModelOpt says what it did.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::parse(&path, &read_object(&path)?)?;
        let own = dir.join("hf_quant_config.json");
        if !config.quantized && own.exists() {
            config.quantize(Fields::new(&own, &read_object(&own)?))?;
        }
        Ok(config)
    }

    fn quantize(&mut self, fields: Fields) -> Result<()> {
        let applied = Quantization::parse(fields)?.apply(&mut self.spec);
        applied.map_err(|error| fields.error(error.to_string()))?;
        self.quantized = true;
        Ok(())
    }

    pub fn parse(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        let top = Fields::new(path, map);
        let found =
            parse_config(&Value::Object(map.clone()).to_string()).map_err(|error| top.error(error.to_string()))?;
        // Where a model that sees as well has what concerns its text.
        let text = if top.string("model_type")? == Some("gemma3") { top.object("text_config")? } else { None };
        let fields = text.unwrap_or(top);
        // Ids stand at the top or beside the text model.
        let ids = |name| Ok::<_, Error>(if fields.has(name) { fields.token_ids(name)? } else { top.token_ids(name)? });
        let mut config = Config {
            vocab_given: found.vocab_given,
            eos_token_ids: ids("eos_token_id")?,
            bos_token_id: ids("bos_token_id")?.first().copied(),
            quantized: false,
            spec: found.spec,
        };
        // It stands at the top or beside the text model.
        for place in [top, fields] {
            if let (false, Some(quantization)) = (config.quantized, place.object("quantization_config")?) {
                config.quantize(quantization)?;
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> Result<Config> {
        Config::parse(Path::new("config.json"), value.as_object().unwrap())
    }

    fn refused(value: Value) -> String {
        parse(value).unwrap_err().to_string()
    }

    fn gemma1() -> Value {
        json!({"model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
               "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
               "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "gelu",
               "torch_dtype": "bfloat16", "bos_token_id": 2, "eos_token_id": 1})
    }

    fn with(mut base: Value, changes: Value) -> Value {
        base.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        base
    }

    #[test]
    fn gemma1_as_first_published() {
        let config = parse(gemma1()).unwrap();
        let layer = &config.spec.layers[27];
        assert_eq!((config.spec.layers.len(), layer.window, layer.head_dim), (28, 0, 256));
        assert_eq!((layer.attention_scale, layer.rope_theta, layer.rope_factor), (0.0625, 1e4, 1.0));
        assert!(!layer.post_norms && !layer.qk_norm && config.spec.tied_embeddings);
        assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![1], Some(2)));
    }

    #[test]
    fn gemma2_has_even_layers_local_and_soft_caps() {
        let base = json!({"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 4608,
            "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16,
            "head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh"});
        let spec = parse(base.clone()).unwrap().spec;
        assert_eq!(spec.layers.iter().map(|l| l.window).take(3).collect::<Vec<_>>(), [4096, 0, 4096]);
        assert_eq!((spec.layers[0].attention_scale, spec.layers[0].attention_soft_cap), (1.0 / 12.0, 50.0));
        assert_eq!(spec.final_soft_cap, 30.0);
        let uncapped = parse(with(base, json!({"attn_logit_softcapping": null}))).unwrap().spec;
        assert_eq!(uncapped.layers[0].attention_soft_cap, 0.0);
    }

    #[test]
    fn gemma3_27b_ends_in_two_local_layers() {
        let spec = parse(json!({"model_type": "gemma3", "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}))
        .unwrap()
        .spec;
        let global: Vec<usize> = (0..62).filter(|&i| spec.layers[i].window == 0).collect();
        assert_eq!(global, [5, 11, 17, 23, 29, 35, 41, 47, 53, 59]);
        assert_eq!((spec.layers[5].rope_theta, spec.layers[5].rope_factor), (1e6, 8.0));
        assert_eq!((spec.layers[61].rope_theta, spec.layers[61].rope_factor), (1e4, 1.0));
    }

    #[test]
    fn gemma3_4b_leaves_out_the_class_defaults() {
        let config = parse(json!({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}))
        .unwrap();
        let spec = &config.spec;
        assert!(!config.vocab_given && spec.vocab_size == 262_208 && spec.max_positions == 131_072);
        let layer = &spec.layers[0];
        assert_eq!((layer.heads, layer.kv_heads, layer.head_dim, layer.window), (8, 4, 256, 1024));
        assert!(layer.qk_norm && layer.post_norms);
        assert_eq!(config.eos_token_ids, [1, 106]);
    }

    #[test]
    fn old_and_new_rope_forms_mean_the_same() {
        let base = json!({"model_type": "gemma3_text", "num_hidden_layers": 7});
        let old = with(
            base.clone(),
            json!({"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"type": "linear", "factor": 8}}),
        );
        let new = with(
            base,
            json!({"rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}),
        );
        assert_eq!(parse(old).unwrap(), parse(new).unwrap());
    }

    #[test]
    fn layer_kinds_in_each_spelling() {
        let base = json!({"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 8});
        let windows = |changes| {
            parse(with(base.clone(), changes)).unwrap().spec.layers.iter().map(|l| l.window).collect::<Vec<_>>()
        };
        assert_eq!(windows(json!({"sliding_window_pattern": 2})), [8, 0, 8, 0]);
        assert_eq!(windows(json!({"_sliding_window_pattern": 3})), [8, 8, 0, 8]);
        let kinds = json!({"layer_types":
            ["full_attention", "sliding_attention", "full_attention", "full_attention"], "sliding_window_pattern": 2});
        assert_eq!(windows(kinds), [0, 8, 0, 0]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (changes, named) in [
            (json!({"model_type": "llama"}), "known: gemma, gemma2, gemma3, gemma3_text"),
            (json!({"model_type": null}), "`model_type` is missing"),
            (json!({"hidden_act": "silu"}), "`hidden_act` \"silu\" is not a GELU"),
            (json!({"hidden_size": -5}), "`hidden_size` is -5"),
            (json!({"hidden_size": 1e300}), "`hidden_size`"),
            (json!({"hidden_size": 99999999999u64}), "`hidden_size`"),
            (json!({"hidden_size": 0}), "hidden_size is 0"),
            (json!({"num_hidden_layers": 4000000000u32}), "`num_hidden_layers`"),
            (json!({"num_key_value_heads": 3}), "does not divide"),
            (json!({"head_dim": 7}), "odd"),
            (json!({"vocab_size": "many"}), "`vocab_size` is \"many\""),
            (json!({"rms_norm_eps": 0.0}), "`rms_norm_eps`"),
            (json!({"rope_theta": "big"}), "`rope_theta`"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2}}), "\"yarn\" is not supported"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "without a `factor`"),
            (json!({"attention_bias": true}), "`attention_bias`"),
            (json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention`"),
            (
                json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
                "`quant_method` \"gptq\" is not supported",
            ),
        ] {
            let message = refused(with(gemma1(), changes));
            assert!(message.starts_with("config.json: ") && message.contains(named), "{message}");
        }
        let no_size = with(gemma1(), json!({"hidden_size": null}));
        assert!(refused(no_size).contains("`hidden_size` is missing"));
        let gemma3 = json!({"model_type": "gemma3_text", "num_hidden_layers": 2});
        assert!(refused(with(gemma3.clone(), json!({"layer_types": ["full_attention"]}))).contains("1 layers of 2"));
        assert!(refused(with(gemma3.clone(), json!({"layer_types": ["a", "b"]}))).contains("\"a\""));
        assert!(refused(with(gemma3, json!({"sliding_window_pattern": 0}))).contains("is 0"));
        assert!(refused(json!({"model_type": "gemma3"})).contains("text_config"));
    }
}
