//! `quantization_config` to the scheme of each matrix: compressed-tensors FP8, ModelOpt FP8, and the `fp8` method of vLLM
//! and transformers.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::fields::Fields;
use crate::engine::{ModelSpec, Scheme};
use crate::error::{Error, Result};

/// Which matrices a checkpoint has in FP8, and how.
#[derive(Debug)]
pub(super) struct Quantization {
    groups: Vec<(Vec<Target>, Scheme)>,
    ignore: Vec<Target>,
    fp8_cache: bool,
}

/// What a list of modules names.
#[derive(Debug)]
enum Target {
    /// `Linear`: every matrix.
    Linear,
    /// `re:…`, matched from the start of the name.
    Pattern(Regex),
    /// A module's whole name, or its last parts.
    Name(String),
}

impl Quantization {
    /// # Errors
    /// [`Error::Config`] naming a scheme that is not FP8 as this engine computes it.
    pub fn parse(fields: Fields) -> Result<Self> {
        match fields.string("quant_method")? {
            Some("compressed-tensors") => Self::compressed_tensors(fields),
            Some("modelopt") => Self::modelopt(fields, fields),
            Some("fp8") => Self::plain_fp8(fields),
            Some(other) => Err(fields.error(format!(
                "`quant_method` {other:?} is not supported; known are compressed-tensors, modelopt and fp8, all of them \
                 with FP8 (E4M3)"
            ))),
            // ModelOpt's own hf_quant_config.json names its producer instead.
            None => match (fields.object("producer")?, fields.object("quantization")?) {
                (Some(producer), Some(own)) if producer.string("name")? == Some("modelopt") => {
                    Self::modelopt(own, fields)
                }
                _ => Err(fields.error("`quant_method` is missing")),
            },
        }
    }

    fn compressed_tensors(fields: Fields) -> Result<Self> {
        match fields.string("format")? {
            None | Some("float-quantized" | "naive-quantized") => {}
            Some(other) => {
                return Err(fields.error(format!(
                    "compressed-tensors format {other:?} is not supported; FP8 has \"float-quantized\""
                )));
            }
        }
        let groups = fields.object("config_groups")?.ok_or_else(|| fields.error("`config_groups` is missing"))?;
        let groups = groups.objects().map(|group| group_scheme(group?)).collect::<Result<_>>()?;
        let fp8_cache = match fields.object("kv_cache_scheme")? {
            None => false,
            Some(cache) => {
                require_fp8(cache, "keys and values", &["tensor", "attn_head"])?;
                if cache.boolean("dynamic")? == Some(true) {
                    return Err(cache.error("`kv_cache_scheme` is dynamic; FP8 keys and values have static scales"));
                }
                true
            }
        };
        Ok(Quantization { groups, ignore: targets(fields, "ignore")?, fp8_cache })
    }

    /// `own` has what was quantized, in a file of its own or within `config.json`.
    fn modelopt(own: Fields, top: Fields) -> Result<Self> {
        match own.string("quant_algo")? {
            Some("FP8") => {}
            other => {
                let other = other.unwrap_or("none");
                return Err(own.error(format!("ModelOpt `quant_algo` {other:?} is not supported; FP8 is")));
            }
        }
        let fp8_cache = match own.string("kv_cache_quant_algo")? {
            None => match top.object("kv_cache_scheme")? {
                None => false,
                Some(cache) => require_fp8(cache, "keys and values", &["tensor"]).map(|()| true)?,
            },
            Some("FP8") => true,
            Some(other) => {
                return Err(own.error(format!("`kv_cache_quant_algo` {other:?} is not supported; FP8 is")));
            }
        };
        let mut ignore = targets(own, "exclude_modules")?;
        ignore.extend(targets(own, "ignore")?);
        Ok(Quantization { groups: vec![(vec![Target::Linear], Scheme::Fp8Static)], ignore, fp8_cache })
    }

    fn plain_fp8(fields: Fields) -> Result<Self> {
        if fields.given("weight_block_size") {
            return Err(
                fields.error("FP8 with a scale for each block of a matrix is not supported; for each row it is")
            );
        }
        let scheme = match fields.string("activation_scheme")? {
            Some("static") => Scheme::Fp8Static,
            None | Some("dynamic") => Scheme::Fp8Dynamic,
            Some(other) => return Err(fields.error(format!("`activation_scheme` {other:?} is not static or dynamic"))),
        };
        let mut ignore = targets(fields, "ignored_layers")?;
        ignore.extend(targets(fields, "modules_to_not_convert")?);
        Ok(Quantization { groups: vec![(vec![Target::Linear], scheme)], ignore, fp8_cache: false })
    }

    /// Writes each matrix's scheme into the spec.
    pub fn apply(&self, spec: &mut ModelSpec) -> Result<()> {
        for (index, layer) in spec.layers.iter_mut().enumerate() {
            let one = |names: &[&str]| {
                let scheme = |name: &&str| self.scheme(&format!("model.layers.{index}.{name}"));
                let first = scheme(&names[0]);
                match names.iter().find(|name| scheme(name) != first) {
                    None => Ok(first),
                    Some(name) => Err(Error::InvalidArgument(format!(
                        "layer {index}: {} and {name} are quantized differently, but they are one matrix here",
                        names[0]
                    ))),
                }
            };
            layer.qkv = one(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?;
            layer.attention_out = one(&["self_attn.o_proj"])?;
            layer.gate_up = one(&["mlp.gate_proj", "mlp.up_proj"])?;
            layer.down = one(&["mlp.down_proj"])?;
            layer.fp8_cache = self.fp8_cache;
        }
        // A tied one is the input embedding, which is no matrix product and stays as it is.
        spec.lm_head = if spec.tied_embeddings { Scheme::Plain } else { self.scheme("lm_head") };
        Ok(())
    }

    fn scheme(&self, module: &str) -> Scheme {
        if self.ignore.iter().any(|target| target.matches(module)) {
            return Scheme::Plain;
        }
        let found = self.groups.iter().find(|(targets, _)| targets.iter().any(|target| target.matches(module)));
        found.map_or(Scheme::Plain, |&(_, scheme)| scheme)
    }
}

impl Target {
    fn parse(fields: Fields, text: &str) -> Result<Self> {
        if text == "Linear" {
            return Ok(Target::Linear);
        }
        let pattern = match text.strip_prefix("re:") {
            Some(pattern) => format!("^(?:{pattern})"),
            // ModelOpt's wildcards.
            None if text.contains('*') => {
                let parts: Vec<String> = text.split('*').map(|part| fancy_regex::escape(part).into_owned()).collect();
                format!("^(?:{})$", parts.join(".*"))
            }
            None => return Ok(Target::Name(text.to_owned())),
        };
        let wrong = |error| fields.error(format!("{text:?} is not a pattern of module names: {error}"));
        Regex::new(&pattern).map(Target::Pattern).map_err(wrong)
    }

    /// A name may be written as in a model of text alone or as in one that sees as well.
    fn matches(&self, module: &str) -> bool {
        let spelled = [
            module.to_owned(),
            format!("language_model.{module}"),
            format!("model.language_model.{}", module.strip_prefix("model.").unwrap_or(module)),
        ];
        spelled.iter().any(|name| match self {
            Target::Linear => true,
            Target::Pattern(pattern) => pattern.is_match(name).unwrap_or(false),
            Target::Name(wanted) => name == wanted || name.ends_with(&format!(".{wanted}")),
        })
    }
}

fn targets(fields: Fields, name: &str) -> Result<Vec<Target>> {
    fields.strings(name)?.unwrap_or_default().into_iter().map(|text| Target::parse(fields, text)).collect()
}

fn group_scheme(group: Fields) -> Result<(Vec<Target>, Scheme)> {
    let weights =
        group.object("weights")?.ok_or_else(|| group.error("a group of `config_groups` without `weights`"))?;
    require_fp8(weights, "weights", &["tensor", "channel"])?;
    if group.object("output_activations")?.is_some() {
        return Err(group.error("`output_activations`: quantized outputs are not supported"));
    }
    let Some(inputs) = group.object("input_activations")? else {
        return Err(group.error(
            "FP8 weights whose inputs are not quantized (W8A16) are not supported; with FP8 inputs, static or for each \
             token, they are",
        ));
    };
    let scheme = if inputs.boolean("dynamic")? == Some(true) {
        require_fp8(inputs, "inputs", &["token"])?;
        Scheme::Fp8Dynamic
    } else {
        require_fp8(inputs, "inputs", &["tensor"])?;
        Scheme::Fp8Static
    };
    Ok((targets(group, "targets")?, scheme))
}

fn require_fp8(fields: Fields, what: &str, strategies: &[&str]) -> Result<()> {
    let bits = fields.count("num_bits")?.unwrap_or(8);
    let kind = fields.string("type")?.unwrap_or("int");
    if bits != 8 || kind != "float" {
        return Err(
            fields.error(format!("{what} of {bits} bits, type {kind:?}, are not supported; 8 bits \"float\" are"))
        );
    }
    if fields.boolean("symmetric")? == Some(false) {
        return Err(fields.error(format!("{what} with a zero point are not supported")));
    }
    match fields.string("strategy")? {
        Some(other) if !strategies.contains(&other) => Err(fields.error(format!(
            "{what} with scales by {other:?} are not supported; by {} they are",
            strategies.join(" or ")
        ))),
        _ => Ok(()),
    }
}

/// What [`Quantization::parse`] reads, for `config.json`'s `quantization_config`.
#[derive(Clone, Debug)]
pub(crate) struct WrittenQuantization {
    /// Modules that stay as they are.
    pub ignore: Vec<String>,
    /// Static scales for inputs, found by calibration, or one for each token.
    pub static_inputs: bool,
    /// A scale for each row of a matrix, or one for all.
    pub by_row: bool,
    /// What keys and values have a scale for, if they are FP8: `tensor` or `attn_head`.
    pub cache: Option<&'static str>,
}

impl WrittenQuantization {
    pub fn to_json(&self) -> Value {
        let args = |strategy: &str, dynamic: bool| serde_json::json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "dynamic": dynamic});
        let mut out = Map::new();
        out.insert("quant_method".into(), "compressed-tensors".into());
        out.insert("format".into(), "float-quantized".into());
        out.insert("quantization_status".into(), "compressed".into());
        let inputs = if self.static_inputs { args("tensor", false) } else { args("token", true) };
        out.insert(
            "config_groups".into(),
            serde_json::json!({"group_0": {
                "targets": ["Linear"],
                "weights": args(if self.by_row { "channel" } else { "tensor" }, false),
                "input_activations": inputs,
                "output_activations": null,
            }}),
        );
        out.insert("kv_cache_scheme".into(), self.cache.map_or(Value::Null, |by| args(by, false)));
        out.insert("ignore".into(), self.ignore.clone().into());
        Value::Object(out)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::checkpoint::named_shape;

    fn parse(value: &Value) -> Result<Quantization> {
        Quantization::parse(Fields::new(Path::new("config.json"), value.as_object().unwrap()))
    }

    fn refused(value: &Value) -> String {
        parse(value).unwrap_err().to_string()
    }

    fn applied(value: &Value, tied: bool) -> ModelSpec {
        let mut spec = named_shape("gemma-3-270m").unwrap();
        spec.tied_embeddings = tied;
        parse(value).unwrap().apply(&mut spec).unwrap();
        spec
    }

    fn with(mut base: Value, changes: Value) -> Value {
        base.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        base
    }

    fn published_static() -> Value {
        json!({"quant_method": "compressed-tensors", "format": "naive-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"],
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false,
                    "symmetric": true, "observer": "minmax", "observer_kwargs": {}, "group_size": null},
                "output_activations": null,
                "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false,
                    "symmetric": true, "block_structure": null}}},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false}})
    }

    #[test]
    fn published_forms() {
        let spec = applied(&published_static(), false);
        assert!(spec.layers.iter().all(|layer| layer.qkv == Scheme::Fp8Static && layer.down == Scheme::Fp8Static));
        assert!(spec.layers[0].fp8_cache && spec.lm_head == Scheme::Plain);

        let mut dynamic = published_static();
        dynamic["config_groups"]["group_0"]["input_activations"] =
            json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true, "symmetric": true});
        dynamic["config_groups"]["group_0"]["weights"]["strategy"] = "channel".into();
        dynamic["kv_cache_scheme"] = Value::Null;
        dynamic["ignore"] = json!(["re:.*mlp\\.(gate|up)_proj$", "model.language_model.layers.3.self_attn.o_proj"]);
        let spec = applied(&dynamic, false);
        assert!(!spec.layers[0].fp8_cache && spec.lm_head == Scheme::Fp8Dynamic);
        assert!(spec.layers.iter().all(|l| l.gate_up == Scheme::Plain && l.qkv == Scheme::Fp8Dynamic));
        assert_eq!((spec.layers[3].attention_out, spec.layers[4].attention_out), (Scheme::Plain, Scheme::Fp8Dynamic));
        assert_eq!(applied(&dynamic, true).lm_head, Scheme::Plain);

        let modelopt = json!({"producer": {"name": "modelopt", "version": "0.30"}, "quantization":
            {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*layers.2.*"]}});
        let spec = applied(&modelopt, false);
        assert!(spec.layers[0].fp8_cache && spec.layers[0].down == Scheme::Fp8Static);
        assert_eq!((spec.layers[2].down, spec.lm_head), (Scheme::Plain, Scheme::Plain));
        let newer = json!({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": false}});
        assert!(applied(&newer, false).layers[5].fp8_cache);

        let fp8 = json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]});
        assert_eq!(applied(&fp8, false).layers[0].qkv, Scheme::Fp8Static);
    }

    #[test]
    fn what_is_written_is_read() {
        for (static_inputs, by_row, cache) in [(true, false, Some("attn_head")), (false, true, None)] {
            let ignore = vec!["lm_head".into(), "model.layers.1.mlp.down_proj".into()];
            let spec = applied(&WrittenQuantization { ignore, static_inputs, by_row, cache }.to_json(), false);
            let scheme = if static_inputs { Scheme::Fp8Static } else { Scheme::Fp8Dynamic };
            assert_eq!(
                (spec.layers[0].down, spec.layers[1].down, spec.lm_head),
                (scheme, Scheme::Plain, Scheme::Plain)
            );
            assert_eq!((spec.layers[1].gate_up, spec.layers[1].fp8_cache), (scheme, cache.is_some()));
        }
    }

    #[test]
    fn other_schemes_are_refused_by_name() {
        let group = |key: &str, value: Value| {
            let mut base = published_static();
            base["config_groups"]["group_0"][key] = value;
            base
        };
        let int8 = json!({"num_bits": 8, "type": "int", "strategy": "channel"});
        let int4 = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128});
        let block = json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]});
        assert!(refused(&group("weights", int8)).contains("8 bits, type \"int\""));
        assert!(refused(&group("weights", int4)).contains("4 bits"));
        assert!(refused(&group("weights", block)).contains("scales by \"block\""));
        assert!(refused(&group("input_activations", Value::Null)).contains("W8A16"));
        assert!(refused(&with(published_static(), json!({"format": "pack-quantized"}))).contains("pack-quantized"));
        assert!(refused(&with(published_static(), json!({"ignore": ["re:("]}))).contains("not a pattern"));
        assert!(refused(&json!({"quant_method": "gptq", "bits": 4})).contains("gptq"));
        assert!(refused(&json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})).contains("NVFP4"));
        assert!(refused(&json!({"quant_method": "fp8", "weight_block_size": [128, 128]})).contains("block"));
        assert!(refused(&json!({})).contains("`quant_method` is missing"));
        let mut spec = named_shape("gemma-3-270m").unwrap();
        let torn = with(published_static(), json!({"ignore": ["k_proj"]}));
        let error = parse(&torn).unwrap().apply(&mut spec).unwrap_err().to_string();
        assert!(error.contains("layer 0: self_attn.q_proj and self_attn.k_proj"), "{error}");
    }
}
