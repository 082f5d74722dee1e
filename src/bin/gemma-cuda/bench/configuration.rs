//! How a line of the table is computed: what is batched, captured, and in FP8.

use std::str::FromStr;

use anyhow::Result;
use gemma_cuda::engine::{ModelSpec, Scheme};

/// What of a model with random weights is in FP8. A checkpoint says so itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    pub matrices: Scheme,
    pub cache: bool,
}

impl Precision {
    pub const BF16: Precision = Precision { matrices: Scheme::Plain, cache: false };

    pub fn of(self, mut spec: ModelSpec) -> ModelSpec {
        for layer in &mut spec.layers {
            (layer.qkv, layer.attention_out) = (self.matrices, self.matrices);
            (layer.gate_up, layer.down) = (self.matrices, self.matrices);
            layer.fp8_cache = self.cache;
        }
        spec
    }
}

/// `--recipe`, with a name that both it and the table have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe(pub Scheme);

impl FromStr for Recipe {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "bf16" => Ok(Recipe(Scheme::Plain)),
            "static" => Ok(Recipe(Scheme::Fp8Static)),
            "channel" => Ok(Recipe(Scheme::Fp8Dynamic)),
            "cast" => Ok(Recipe(Scheme::Fp8Cast)),
            _ => Err(format!("unknown recipe {name:?}; use bf16, static, channel or cast")),
        }
    }
}

#[derive(Clone, Copy)]
pub struct Configuration {
    pub name: &'static str,
    pub padded: bool,
    pub graphs: bool,
    pub precision: Precision,
}

const fn row(name: &'static str, padded: bool, graphs: bool, matrices: Scheme, cache: bool) -> Configuration {
    Configuration { name, padded, graphs, precision: Precision { matrices, cache } }
}

/// The tutorial's steps, and one beyond them. Those in FP8 are for random weights: a checkpoint has but one precision.
pub const LADDER: [Configuration; 6] = [
    row("padded", true, false, Scheme::Plain, false),
    row("ragged", false, false, Scheme::Plain, false),
    row("ragged + graphs", false, true, Scheme::Plain, false),
    row("FP8, cast", false, true, Scheme::Fp8Cast, false),
    row("FP8", false, true, Scheme::Fp8Static, false),
    row("FP8, FP8 K/V", false, true, Scheme::Fp8Static, true),
];

impl Configuration {
    /// One that is asked for by itself.
    pub fn single(graphs: bool, precision: Precision) -> Configuration {
        let name = match (precision.matrices, precision.cache, graphs) {
            (Scheme::Plain, false, true) => "ragged + graphs",
            (Scheme::Plain, false, false) => "ragged",
            (Scheme::Plain, true, _) => "FP8 K/V",
            (Scheme::Fp8Static, false, _) => "FP8",
            (Scheme::Fp8Static, true, _) => "FP8, FP8 K/V",
            (Scheme::Fp8Dynamic, false, _) => "FP8 channel",
            (Scheme::Fp8Dynamic, true, _) => "FP8 chan., K/V",
            (_, false, _) => "FP8, cast",
            (_, true, _) => "FP8, cast, K/V",
        };
        Configuration { name, padded: false, graphs, precision }
    }

    /// Whether tokens are to be the same as those of the first row.
    pub fn as_exact_as_bf16(&self) -> bool {
        self.precision == Precision::BF16
    }
}

/// What NVIDIA's tutorial publishes for the workload `seed`'s counterpart, in seconds: 64 prompts of up to 128 tokens,
/// 1024 in all, on a machine of theirs.
pub const PUBLISHED: [(&str, f64); 5] = [
    ("Hugging Face", 87.68),
    ("TE layers, padded", 54.11),
    ("TE + THD", 28.22),
    ("TE + THD + graphs", 16.75),
    ("TE + THD + FP8", 12.13),
];
