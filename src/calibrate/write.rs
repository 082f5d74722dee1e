//! FP8 checkpoints in the form of compressed-tensors.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::tensor::View;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Map, Value, json};

use super::scales::{Method, scale_for};
use super::statistics::Statistics;
use crate::checkpoint::{Checkpoint, StoredTensor, WrittenQuantization, read_object};
use crate::engine::{DType, quantize_e4m3};
use crate::error::{Error, Result};
use crate::parallel::in_parallel;

/// How matrices and their inputs become FP8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecipeKind {
    /// One scale a matrix, those that are multiplied as one sharing it, and one for its inputs, found by calibration.
    Static,
    /// A scale for each row of a matrix and for each token of its inputs. Needs no calibration.
    Channel,
}

/// How keys and values are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// As the model computes them.
    Bf16,
    /// In FP8 with a scale for each K/V head.
    Fp8,
    /// In FP8 with one scale a layer for keys and one for values, for loaders that know no other.
    Fp8Tensor,
}

/// What is to be FP8 in a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// How matrices and their inputs are scaled.
    pub kind: RecipeKind,
    /// How keys and values are kept.
    pub cache: CacheType,
    /// The output embedding too; where it is tied to the input's, it becomes a matrix of its own.
    pub fp8_lm_head: bool,
    /// Layers whose matrices stay as they are.
    pub keep: Vec<u32>,
    /// What scales of activations, keys and values are made of.
    pub method: Method,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            kind: RecipeKind::Static,
            cache: CacheType::Bf16,
            fp8_lm_head: false,
            keep: Vec::new(),
            method: Method::Largest,
        }
    }
}

impl Recipe {
    /// Whether it has scales that only calibration can give.
    pub fn needs_statistics(&self) -> bool {
        self.method != Method::One && (self.kind == RecipeKind::Static || self.cache != CacheType::Bf16)
    }
}

impl FromStr for RecipeKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "static" => Ok(RecipeKind::Static),
            "channel" => Ok(RecipeKind::Channel),
            _ => Err(Error::InvalidArgument(format!("unknown recipe {text:?}; use static or channel"))),
        }
    }
}

impl FromStr for CacheType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "bf16" => Ok(CacheType::Bf16),
            "fp8" => Ok(CacheType::Fp8),
            "fp8-tensor" => Ok(CacheType::Fp8Tensor),
            _ => Err(Error::InvalidArgument(format!("unknown cache type {text:?}; use bf16, fp8 or fp8-tensor"))),
        }
    }
}

/// Bytes of a shard, unless one tensor has more.
const SHARD: usize = 5_000_000_000;

/// Writes the FP8 checkpoint of `checkpoint` that `recipe` describes to the folder `out`, with tokenizer and configs; tells
/// how many bytes of how many are written. The folder appears when all is there.
///
/// # Errors
/// [`Error::InvalidArgument`] if `out` is there already, if `checkpoint` is quantized, if a layer to be kept does not exist,
/// or if statistics are missing, incomplete or not finite; [`Error::Io`] where something cannot be read or written, a full
/// disk for one: nothing is left behind then.
pub fn write_checkpoint(
    checkpoint: &Checkpoint,
    statistics: Option<&Statistics>,
    recipe: &Recipe,
    out: &Path,
    progress: impl FnMut(u64, u64),
) -> Result<()> {
    if out.exists() {
        return Err(Error::InvalidArgument(format!("{} is there already; name a new folder", out.display())));
    }
    let plan = Plan::new(checkpoint, statistics, recipe)?;
    let name = out.file_name().ok_or_else(|| Error::InvalidArgument(format!("{} names no folder", out.display())))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".partial");
    let partial = out.with_file_name(hidden);
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::io(&path, source)
    };
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io(&partial))?; // of a run that was killed
    }
    fs::create_dir_all(&partial).map_err(io(&partial))?;
    let written = plan.write(checkpoint, &partial, progress).and_then(|()| fs::rename(&partial, out).map_err(io(out)));
    if written.is_err() {
        // What went wrong first is what the caller should hear of.
        let _ = fs::remove_dir_all(&partial);
    }
    written
}

/// One tensor of the new checkpoint.
struct Planned<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    content: Content<'a>,
}

/// The same on its way to the file; FP8 is made when its turn comes.
struct Output<'a> {
    tensor: Planned<'a>,
    done: &'a RefCell<Done<'a>>,
}

enum Content<'a> {
    Copied(&'a [u8]),
    Quantized { dtype: DType, bytes: &'a [u8], scales: Arc<Vec<f32>> },
    Scales(Arc<Vec<f32>>),
}

impl Content<'_> {
    /// Bytes in the file.
    fn len(&self) -> usize {
        match self {
            Content::Copied(bytes) => bytes.len(),
            Content::Scales(scales) => scales.len() * 4,
            Content::Quantized { dtype, bytes, .. } => bytes.len() / size_of(*dtype),
        }
    }
}

/// How far writing has come, and what went wrong within it.
struct Done<'a> {
    bytes: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    error: Option<Error>,
}

impl View for Output<'_> {
    fn dtype(&self) -> Dtype {
        self.tensor.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = match &self.tensor.content {
            Content::Copied(bytes) => Cow::Borrowed(*bytes),
            Content::Scales(scales) => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<u8>>().into(),
            Content::Quantized { dtype, bytes, scales } => match quantize(*dtype, bytes, scales) {
                Ok(codes) => codes.into(),
                Err(error) => {
                    self.done.borrow_mut().error.get_or_insert(error);
                    vec![0; self.data_len()].into()
                }
            },
        };
        let mut done = self.done.borrow_mut();
        done.bytes += bytes.len() as u64;
        let (now, total) = (done.bytes, done.total);
        (done.progress)(now, total);
        bytes
    }
    fn data_len(&self) -> usize {
        self.tensor.content.len()
    }
}

struct Plan<'a> {
    tensors: Vec<Planned<'a>>,
    config: Map<String, Value>,
}

impl<'a> Plan<'a> {
    fn new(checkpoint: &'a Checkpoint, statistics: Option<&Statistics>, recipe: &Recipe) -> Result<Self> {
        if checkpoint.is_quantized() {
            return Err(Error::InvalidArgument(format!("{} is quantized already", checkpoint.dir().display())));
        }
        let layers = checkpoint.spec().layers.len() as u32;
        if let Some(layer) = recipe.keep.iter().find(|&&layer| layer >= layers) {
            return Err(Error::InvalidArgument(format!("there is no layer {layer} to keep; the model has {layers}")));
        }
        let statistics = match statistics {
            Some(found) if !found.is_complete() => {
                return Err(Error::InvalidArgument("calibration has not been through all of its text".into()));
            }
            None if recipe.needs_statistics() => {
                return Err(Error::InvalidArgument(
                    "this recipe has static scales, which calibration must find first".into(),
                ));
            }
            found => found,
        };
        let mut planner = Planner { checkpoint, statistics, recipe, tensors: Vec::new(), ignore: Vec::new() };
        planner.matrices()?;
        planner.cache()?;
        let config = planner.config()?;
        Ok(Plan { tensors: planner.tensors, config })
    }

    fn write(self, checkpoint: &Checkpoint, dir: &Path, mut progress: impl FnMut(u64, u64)) -> Result<()> {
        copy_other_files(checkpoint.dir(), dir)?;
        write_json(&dir.join("config.json"), &Value::Object(self.config))?;
        let total = self.tensors.iter().map(|tensor| tensor.content.len() as u64).sum();
        let done = RefCell::new(Done { bytes: 0, total, progress: &mut progress, error: None });
        let mut shards: Vec<(usize, Vec<Planned>)> = Vec::new();
        for tensor in self.tensors {
            let size = tensor.content.len();
            match shards.last_mut() {
                Some((used, shard)) if *used + size <= SHARD => {
                    *used += size;
                    shard.push(tensor);
                }
                _ => shards.push((size, vec![tensor])),
            }
        }
        let count = shards.len();
        let mut index = BTreeMap::new();
        for (number, (_, shard)) in shards.into_iter().enumerate() {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            index.extend(shard.iter().map(|tensor| (tensor.name.clone(), file.clone())));
            let views = shard.into_iter().map(|tensor| (tensor.name.clone(), Output { tensor, done: &done }));
            let path = dir.join(file);
            let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
            let failed = |error| match error {
                safetensors::SafeTensorError::IoError(source) => Error::io(&path, source),
                other => Error::checkpoint(&path, format!("cannot be written: {other}")),
            };
            serialize_to_file(views, Some(metadata), &path).map_err(failed)?;
            if let Some(error) = done.borrow_mut().error.take() {
                return Err(error);
            }
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": index});
            write_json(&dir.join("model.safetensors.index.json"), &index)?;
        }
        Ok(())
    }
}

/// Decides tensor by tensor.
struct Planner<'a, 'b> {
    checkpoint: &'a Checkpoint,
    statistics: Option<&'b Statistics>,
    recipe: &'b Recipe,
    tensors: Vec<Planned<'a>>,
    /// Matrices that stay as they are.
    ignore: Vec<String>,
}

/// The matrices that are multiplied as one with `module`, itself among them, and the one whose inputs stand for theirs.
fn fused(module: &str) -> (Vec<String>, String) {
    for group in [&["q_proj", "k_proj", "v_proj"][..], &["gate_proj", "up_proj"]] {
        if let Some(prefix) = group.iter().find_map(|name| module.strip_suffix(name)) {
            let all = group.iter().map(|name| format!("{prefix}{name}")).collect();
            return (all, format!("{prefix}{}", group[0]));
        }
    }
    (vec![module.to_owned()], module.to_owned())
}

fn layer_of(module: &str) -> Option<u32> {
    module.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

impl<'a> Planner<'a, '_> {
    fn matrices(&mut self) -> Result<()> {
        let maxima = self.row_maxima()?;
        for stored in self.checkpoint.stored() {
            let Some(module) = stored.canonical.and_then(|name| name.strip_suffix(".weight")) else {
                self.copy(&stored);
                continue;
            };
            if module == "model.embed_tokens" {
                self.copy(&stored);
                if self.checkpoint.spec().tied_embeddings {
                    self.tied_head(&stored, &maxima)?;
                }
            } else if stored.shape.len() != 2 {
                self.copy(&stored);
            } else if let Some(own) = maxima.get(module) {
                let name = stored.name.strip_suffix(".weight").unwrap_or(stored.name);
                self.quantize(&stored, module, name, own, &maxima)?;
            } else {
                self.ignore.push(stored.name.strip_suffix(".weight").unwrap_or(stored.name).to_owned());
                self.copy(&stored);
            }
        }
        Ok(())
    }

    /// The largest magnitudes in the rows of every matrix that is to be FP8, by module.
    fn row_maxima(&self) -> Result<BTreeMap<String, Vec<f32>>> {
        let mut out = BTreeMap::new();
        for stored in self.checkpoint.stored() {
            let Some(module) = stored.canonical.and_then(|name| name.strip_suffix(".weight")) else { continue };
            let wanted = match (module, layer_of(module)) {
                ("lm_head", _) => self.recipe.fp8_lm_head,
                ("model.embed_tokens", _) => self.recipe.fp8_lm_head && self.checkpoint.spec().tied_embeddings,
                (_, Some(layer)) => stored.shape.len() == 2 && !self.recipe.keep.contains(&layer),
                _ => false,
            };
            if wanted {
                out.insert(module.to_owned(), row_maxima(&stored)?);
            }
        }
        Ok(out)
    }

    fn copy(&mut self, stored: &StoredTensor<'a>) {
        self.push(stored.name.to_owned(), stored.file_dtype, stored.shape, Content::Copied(stored.bytes));
    }

    fn push(&mut self, name: String, dtype: Dtype, shape: &[u64], content: Content<'a>) {
        let shape = shape.iter().map(|&extent| extent as usize).collect();
        self.tensors.push(Planned { name, dtype, shape, content });
    }

    /// `name` is the module's in the new checkpoint.
    fn quantize(
        &mut self,
        stored: &StoredTensor<'a>,
        module: &str,
        name: &str,
        own: &[f32],
        maxima: &BTreeMap<String, Vec<f32>>,
    ) -> Result<()> {
        let (together, reader) = fused(module);
        let all = |maxima: &[f32]| maxima.iter().fold(0.0, |a: f32, &b| a.max(b));
        let (scales, shape) = match (self.recipe.method, self.recipe.kind) {
            (Method::One, _) => (vec![1.0], vec![1]),
            (_, RecipeKind::Channel) => {
                (own.iter().map(|&largest| scale_for(largest)).collect(), vec![stored.shape[0], 1])
            }
            (_, RecipeKind::Static) => {
                let largest =
                    together.iter().filter_map(|module| maxima.get(module)).map(|rows| all(rows)).fold(0.0, f32::max);
                (vec![scale_for(largest)], vec![1])
            }
        };
        let scales = Arc::new(scales);
        let content = Content::Quantized { dtype: stored.dtype, bytes: stored.bytes, scales: Arc::clone(&scales) };
        self.push(format!("{name}.weight"), Dtype::F8_E4M3, stored.shape, content);
        self.push(format!("{name}.weight_scale"), Dtype::F32, &shape, Content::Scales(scales));
        if self.recipe.kind == RecipeKind::Static {
            let scale = self.calibrated(&format!("{reader}.input_scale"))?;
            self.push(format!("{name}.input_scale"), Dtype::F32, &[1], Content::Scales(Arc::new(scale)));
        }
        Ok(())
    }

    /// The output embedding of a model that has it tied, beside the input embedding.
    fn tied_head(&mut self, embedding: &StoredTensor<'a>, maxima: &BTreeMap<String, Vec<f32>>) -> Result<()> {
        let name = if embedding.name.starts_with("language_model.") { "language_model.lm_head" } else { "lm_head" };
        match maxima.get("model.embed_tokens") {
            Some(own) => self.quantize(embedding, "lm_head", name, own, maxima),
            None => {
                self.ignore.push("lm_head".into());
                Ok(())
            }
        }
    }

    fn calibrated(&self, name: &str) -> Result<Vec<f32>> {
        if self.recipe.method == Method::One {
            return Ok(vec![1.0]);
        }
        let magnitudes = self.statistics.and_then(|statistics| statistics.get(name)).ok_or_else(|| {
            Error::InvalidArgument(format!("the statistics have nothing for {name}; they are of another model"))
        })?;
        self.recipe.method.scales(name, magnitudes)
    }

    fn cache(&mut self) -> Result<()> {
        if self.recipe.cache == CacheType::Bf16 {
            return Ok(());
        }
        for stored in self.checkpoint.stored() {
            let prefix = stored.name.strip_suffix(".q_proj.weight");
            let canonical = stored.canonical.and_then(|name| name.strip_suffix(".q_proj.weight"));
            let (Some(prefix), Some(canonical)) = (prefix, canonical) else { continue };
            for which in ["k_scale", "v_scale"] {
                let mut scales = self.calibrated(&format!("{canonical}.{which}"))?;
                let heads =
                    layer_of(canonical).map_or(1, |layer| self.checkpoint.spec().layers[layer as usize].kv_heads);
                let shape = if self.recipe.cache == CacheType::Fp8 {
                    scales.resize(heads as usize, scales[0]); // one for all where there is no calibration
                    vec![u64::from(heads), 1, 1]
                } else {
                    scales = vec![scales.iter().fold(0.0, |a: f32, &b| a.max(b))];
                    vec![1]
                };
                self.push(format!("{prefix}.{which}"), Dtype::F32, &shape, Content::Scales(Arc::new(scales)));
            }
        }
        Ok(())
    }

    fn config(&mut self) -> Result<Map<String, Value>> {
        let mut config = read_object(&self.checkpoint.dir().join("config.json"))?;
        if self.checkpoint.skipped().next().is_some() {
            for tower in ["vision_tower", "multi_modal_projector", "embed_vision"] {
                self.ignore.push(format!("re:.*{tower}.*"));
            }
        }
        let recipe = self.recipe;
        let quantization = WrittenQuantization {
            ignore: std::mem::take(&mut self.ignore),
            static_inputs: recipe.kind == RecipeKind::Static,
            by_row: recipe.kind == RecipeKind::Channel && recipe.method != Method::One,
            cache: match recipe.cache {
                CacheType::Bf16 => None,
                CacheType::Fp8 => Some("attn_head"),
                CacheType::Fp8Tensor => Some("tensor"),
            },
        };
        config.insert("quantization_config".into(), quantization.to_json());
        if recipe.fp8_lm_head && self.checkpoint.spec().tied_embeddings {
            if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
                text.insert("tie_word_embeddings".into(), false.into());
            }
            config.insert("tie_word_embeddings".into(), false.into());
        }
        Ok(config)
    }
}

fn size_of(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4,
        DType::E4M3 => 1,
        _ => 2,
    }
}

/// The largest magnitude in each row.
fn row_maxima(stored: &StoredTensor) -> Result<Vec<f32>> {
    fn rows<const N: usize>(bytes: &[u8], width: usize, value: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
        let largest = |row: &[[u8; N]]| {
            row.iter().map(|&element| value(element).abs()).fold(0.0f32, |a, b| if b > a || b.is_nan() { b } else { a })
        };
        let rows: Vec<&[[u8; N]]> = bytes.as_chunks::<N>().0.chunks(width).collect();
        in_parallel(&rows, |_, row| largest(row))
    }
    let width = (stored.shape[1] as usize).max(1);
    let maxima = match stored.dtype {
        DType::F32 => rows(stored.bytes, width, f32::from_le_bytes),
        DType::BF16 => rows(stored.bytes, width, |b| bf16::from_le_bytes(b).to_f32()),
        _ => rows(stored.bytes, width, |b| f16::from_le_bytes(b).to_f32()),
    };
    match maxima.iter().position(|largest| !largest.is_finite()) {
        Some(row) => Err(Error::InvalidArgument(format!(
            "tensor {} holds a NaN or infinity in row {row}; no scale can be made of that",
            stored.name
        ))),
        None => Ok(maxima),
    }
}

fn quantize(dtype: DType, bytes: &[u8], scales: &[f32]) -> Result<Vec<u8>> {
    let rows = scales.len();
    let row_bytes = bytes.len() / rows.max(1);
    // With one scale for all, any cut into pieces will do.
    let pieces: Vec<(&[u8], &[f32])> = if rows == 1 {
        bytes.chunks(1 << 20).map(|piece| (piece, scales)).collect()
    } else {
        bytes.chunks(row_bytes.max(1)).zip(scales.chunks(1)).collect()
    };
    let codes = in_parallel(&pieces, |_, (bytes, scales)| quantize_e4m3(dtype, bytes, scales));
    Ok(codes.into_iter().collect::<Result<Vec<Vec<u8>>>>()?.concat())
}

/// Tokenizer, templates, generation config, licenses: all but weights and what is written anew.
fn copy_other_files(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).map_err(|source| Error::io(from, source))?;
    for entry in entries {
        let path: PathBuf = entry.map_err(|source| Error::io(from, source))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let weights = name == "config.json"
            || name.ends_with(".index.json")
            || [".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack"]
                .iter()
                .any(|end| name.ends_with(end));
        if path.is_file() && !weights && !name.starts_with('.') {
            fs::copy(&path, to.join(name)).map_err(|source| Error::io(&path, source))?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::config(path, error.to_string()))?;
    text.push('\n');
    fs::write(path, text).map_err(|source| Error::io(path, source))
}
