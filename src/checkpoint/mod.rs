//! Checkpoints as Hugging Face stores them: `config.json`, safetensors, tokenizer, chat template.

mod config;
mod fields;
mod generation_config;
mod quantization;
mod safetensors;
mod shapes;
mod template;
mod tokenizer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

pub(crate) use fields::read_object;
pub use generation_config::GenerationConfig;
pub(crate) use quantization::WrittenQuantization;
pub use shapes::named_shape;
pub use template::{ChatTemplate, Message};
pub use tokenizer::{IncrementalDecoder, Tokenizer};

use crate::engine::{DType, ModelSpec, tensor_table};
use crate::error::{Error, Result};
use config::Config;
use safetensors::{Files, Stored};

/// A checkpoint folder whose configuration, tensor names and shapes have been checked. The weights are mapped, not
/// read.
pub struct Checkpoint {
    dir: PathBuf,
    spec: ModelSpec,
    generation_config: GenerationConfig,
    files: Files,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<ChatTemplate>,
}

/// One tensor of the model, as the checkpoint stores it.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    name: &'a str,
    stored: &'a Stored,
    bytes: &'a [u8],
}

/// Any tensor of the files, be it the model's or not.
pub(crate) struct StoredTensor<'a> {
    pub name: &'a str,
    /// The model's name for it.
    pub canonical: Option<&'a str>,
    /// Of the model's tensors.
    pub dtype: DType,
    pub file_dtype: ::safetensors::Dtype,
    pub shape: &'a [u64],
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// The model's name for it: `model.layers.0.self_attn.q_proj.weight`.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// How its elements are stored.
    pub fn dtype(&self) -> DType {
        self.stored.dtype
    }

    /// Row-major; `[out, in]` for matrices.
    pub fn shape(&self) -> &'a [u64] {
        &self.stored.shape
    }

    /// Whether it holds scales of FP8, not values.
    pub fn is_scale(&self) -> bool {
        is_scale(self.name)
    }

    /// Its elements, little-endian.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl Checkpoint {
    /// Reads the configuration and the headers in `dir`, and holds the tensors against the model's table.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Config`] for a configuration that is not a Gemma this
    /// version knows, [`Error::Checkpoint`] for a malformed file or a tensor that is missing, misshapen, there twice
    /// or left over; each names the file and the thing in it. [`Error::Tokenizer`] for a broken tokenizer or template.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            let what = if dir.exists() { "is not a folder" } else { "does not exist" };
            return Err(Error::checkpoint(dir, format!("{what}; a checkpoint is a folder with config.json in it")));
        }
        let mut config = Config::read(dir)?;
        let files = Files::open(dir)?;
        take_vocabulary_from_embedding(&mut config, &files);
        let mut checkpoint = Checkpoint {
            dir: dir.to_owned(),
            generation_config: GenerationConfig::read(dir, &config)?,
            tokenizer: Tokenizer::read(dir, config.spec.vocab_size)?,
            chat_template: ChatTemplate::read(dir)?,
            spec: config.spec,
            files,
        };
        checkpoint.leave_out_copied_lm_head()?;
        checkpoint.match_table()?;
        Ok(checkpoint)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// `generation_config.json`, with the special tokens of `config.json` where it names none.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// `None` if there is no `tokenizer.json`.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// `None` if the checkpoint has no chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The model's tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.files.tensors.iter().filter_map(|stored| {
            let name = stored.canonical.as_deref()?;
            Some(Tensor { name, stored, bytes: self.files.bytes(stored) })
        })
    }

    /// Everything in the files, in their order.
    pub(crate) fn stored(&self) -> impl Iterator<Item = StoredTensor<'_>> {
        self.files.tensors.iter().map(|stored| StoredTensor {
            name: &stored.name,
            canonical: stored.canonical.as_deref(),
            dtype: stored.dtype,
            file_dtype: stored.file_dtype,
            shape: &stored.shape,
            bytes: self.files.bytes(stored),
        })
    }

    /// Names of tensors that text generation leaves aside: those of a vision tower, and copies of what is there
    /// already.
    pub fn skipped(&self) -> impl Iterator<Item = &str> {
        self.files.tensors.iter().filter(|stored| stored.canonical.is_none()).map(|stored| stored.name.as_str())
    }

    /// Bytes of the model's tensors on disk.
    pub fn total_bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.bytes.len() as u64).sum()
    }

    /// Whether bf16 holds every matrix that is not FP8 exactly, because that is what the checkpoint stores.
    pub fn is_bf16(&self) -> bool {
        self.tensors().all(|tensor| {
            matches!(tensor.dtype(), DType::BF16 | DType::E4M3) || tensor.is_scale() || tensor.shape().len() < 2
        })
    }

    /// Whether the checkpoint holds FP8 already.
    pub fn is_quantized(&self) -> bool {
        self.tensors().any(|tensor| tensor.dtype() == DType::E4M3 || tensor.is_scale())
    }

    /// Looks for NaN and infinity in every weight.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the first tensor that has one, and where.
    pub fn check_weights(&self) -> Result<()> {
        for tensor in self.tensors() {
            let bytes = tensor.bytes;
            let bad = match tensor.dtype() {
                DType::F32 => position(bytes, |b| f32::from_le_bytes(b).is_finite()),
                DType::BF16 => position(bytes, |b| bf16::from_le_bytes(b).is_finite()),
                DType::E4M3 => position(bytes, |[b]: [u8; 1]| b & 0x7f != 0x7f),
                _ => position(bytes, |b| f16::from_le_bytes(b).is_finite()),
            };
            if let Some(at) = bad {
                return Err(Error::checkpoint(
                    self.files.path(tensor.stored),
                    format!("tensor {} holds a NaN or infinity at element {at}", tensor.stored.name),
                ));
            }
        }
        Ok(())
    }

    /// Some checkpoints store an output embedding although it is tied. A copy is left aside; another one is a
    /// contradiction.
    fn leave_out_copied_lm_head(&mut self) -> Result<()> {
        if !self.spec.tied_embeddings {
            return Ok(());
        }
        let find = |name| self.files.tensors.iter().position(|stored| stored.canonical.as_deref() == Some(name));
        let Some(head) = find("lm_head.weight") else { return Ok(()) };
        let stored = &self.files.tensors[head];
        let copied = find("model.embed_tokens.weight")
            .map(|embedding| &self.files.tensors[embedding])
            .is_some_and(|e| e.dtype == stored.dtype && self.files.bytes(e) == self.files.bytes(stored));
        if !copied {
            return Err(Error::checkpoint(
                self.files.path(stored),
                "holds an lm_head.weight of its own, but config.json says `tie_word_embeddings`; set it to false",
            ));
        }
        self.files.tensors[head].canonical = None;
        Ok(())
    }

    /// Every tensor of the model is there, in its shape, and no other.
    fn match_table(&self) -> Result<()> {
        let table = tensor_table(&self.spec)?;
        let wanted: HashMap<&str, &[u64]> = table.iter().map(|slot| (&*slot.name, &*slot.shape)).collect();
        let mut found = HashMap::new();
        // Scales come as vectors, columns or scalars; the engine takes them all.
        let fits = |tensor: &Tensor, shape: &[u64]| {
            let count: u64 = tensor.shape().iter().product();
            tensor.shape() == shape || tensor.is_scale() && (count == 1 || count == shape.iter().product::<u64>())
        };
        for tensor in self.tensors() {
            let wrong = |message| Err(Error::checkpoint(self.files.path(tensor.stored), message));
            let name = &tensor.stored.name;
            match wanted.get(tensor.name) {
                None => return wrong(format!("tensor {name} {:?} is not one of this model's", tensor.shape())),
                Some(shape) if !fits(&tensor, shape) => {
                    return wrong(format!("tensor {name} has shape {:?}, the model wants {shape:?}", tensor.shape()));
                }
                Some(_) => found.insert(tensor.name, tensor.dtype()),
            };
        }
        // A matrix that is to be FP8 and is not yet has no scales: it is quantized while it is loaded.
        let unquantized = |name: &str| {
            let matrix = name.strip_suffix("_scale").and_then(|matrix| found.get(matrix));
            matrix.is_some_and(|&dtype| dtype != DType::E4M3)
        };
        match table.iter().find(|slot| !found.contains_key(&*slot.name) && !unquantized(&slot.name)) {
            Some(slot) => {
                Err(Error::checkpoint(&self.dir, format!("tensor {} {:?} is missing", slot.name, slot.shape)))
            }
            None => Ok(()),
        }
    }
}

fn is_scale(name: &str) -> bool {
    [".weight_scale", ".input_scale", ".k_scale", ".v_scale"].iter().any(|end| name.ends_with(end))
}

/// A Gemma 3 config may leave the vocabulary's size to the embedding.
fn take_vocabulary_from_embedding(config: &mut Config, files: &Files) {
    let embedding =
        files.tensors.iter().find(|stored| stored.canonical.as_deref() == Some("model.embed_tokens.weight"));
    if let (false, Some(&[rows, _])) = (config.vocab_given, embedding.map(|stored| &*stored.shape))
        && let Ok(rows) = u32::try_from(rows)
    {
        config.spec.vocab_size = rows;
    }
}

/// The first element of `N` bytes that is not `fine`.
fn position<const N: usize>(bytes: &[u8], fine: impl Fn([u8; N]) -> bool) -> Option<usize> {
    bytes.as_chunks::<N>().0.iter().position(|&element| !fine(element))
}
