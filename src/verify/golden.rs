//! Reads a file of golden values and checks that it is whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::engine::ModelSpec;
use crate::{Error, Result};

pub(super) struct Golden {
    path: PathBuf,
    prompts: Vec<GoldenPrompt>,
}

#[derive(Default)]
pub(super) struct GoldenPrompt {
    /// The `i` of `p{i}.ids`.
    pub index: usize,
    pub ids: Vec<u32>,
    pub greedy: Option<Vec<u32>>,
    /// `[teacher_forced, vocab]`
    pub logits: Option<Vec<f32>>,
    pub hidden: Vec<GoldenLayer>,
}

pub(super) struct GoldenLayer {
    pub layer: usize,
    /// `[ids, hidden]`
    pub values: Vec<f32>,
}

impl GoldenPrompt {
    /// The tokens whose successors the golden logits predict.
    pub fn teacher_forced(&self) -> Vec<u32> {
        let greedy = self.greedy.as_deref().unwrap_or_default();
        [&self.ids, &greedy[..greedy.len().saturating_sub(1)]].concat()
    }
}

impl Golden {
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| Error::checkpoint(path, error.to_string()))?;
        let mut prompts: BTreeMap<usize, GoldenPrompt> = BTreeMap::new();
        for (name, tensor) in file.iter() {
            let (index, part) = parse_name(name).ok_or_else(|| {
                Error::checkpoint(
                    path,
                    format!("tensor {name:?} is none of p{{i}}.ids, .greedy, .logits, .hidden.{{l}}"),
                )
            })?;
            let prompt = prompts.entry(index).or_insert_with(|| GoldenPrompt { index, ..Default::default() });
            let read = match part {
                Part::Ids => token_ids(&tensor).map(|ids| prompt.ids = ids),
                Part::Greedy => token_ids(&tensor).map(|ids| prompt.greedy = Some(ids)),
                Part::Logits => floats(&tensor).map(|values| prompt.logits = Some(values)),
                Part::Hidden(layer) => floats(&tensor).map(|values| prompt.hidden.push(GoldenLayer { layer, values })),
            };
            read.map_err(|message| Error::checkpoint(path, format!("{name}: {message}")))?;
        }
        let mut prompts: Vec<GoldenPrompt> = prompts.into_values().collect();
        prompts.iter_mut().for_each(|prompt| prompt.hidden.sort_by_key(|hidden| hidden.layer));
        match prompts.iter().find(|prompt| prompt.ids.is_empty()) {
            Some(prompt) => Err(Error::checkpoint(path, format!("p{}.ids is missing or empty", prompt.index))),
            None if prompts.is_empty() => Err(Error::checkpoint(path, "holds no golden values")),
            None => Ok(Golden { path: path.to_owned(), prompts }),
        }
    }

    pub fn prompts(&self) -> &[GoldenPrompt] {
        &self.prompts
    }

    /// Tokens of the longest prompt with what is generated after it.
    pub fn longest(&self) -> usize {
        let length = |p: &GoldenPrompt| p.ids.len() + p.greedy.as_ref().map_or(0, Vec::len);
        self.prompts.iter().map(length).max().unwrap_or(0)
    }

    /// Whether these can be values of this model.
    pub fn check_against(&self, spec: &ModelSpec) -> Result<()> {
        for prompt in &self.prompts {
            let index = prompt.index;
            let fail = |message: String| Err(Error::checkpoint(&self.path, message));
            let tokens = prompt.ids.iter().chain(prompt.greedy.iter().flatten());
            if let Some(token) = tokens.copied().find(|&token| token >= spec.vocab_size) {
                return fail(format!("p{index} holds token {token}; the model's vocabulary has {}", spec.vocab_size));
            }
            let rows = prompt.teacher_forced().len();
            let expected = rows * spec.vocab_size as usize;
            if let Some(logits) = prompt.logits.as_ref().filter(|logits| logits.len() != expected) {
                let vocab = spec.vocab_size;
                return fail(format!("p{index}.logits has {} values, not [{rows}, {vocab}]", logits.len()));
            }
            let expected = prompt.ids.len() * spec.hidden_size as usize;
            for GoldenLayer { layer, values } in &prompt.hidden {
                if *layer > spec.layers.len() {
                    return fail(format!("p{index}.hidden.{layer}: the model has {} layers", spec.layers.len()));
                }
                if values.len() != expected {
                    let (rows, width) = (prompt.ids.len(), spec.hidden_size);
                    return fail(format!("p{index}.hidden.{layer} has {} values, not [{rows}, {width}]", values.len()));
                }
            }
        }
        Ok(())
    }
}

enum Part {
    Ids,
    Greedy,
    Logits,
    Hidden(usize),
}

fn parse_name(name: &str) -> Option<(usize, Part)> {
    let (index, part) = name.strip_prefix('p')?.split_once('.')?;
    let part = match part {
        "ids" => Part::Ids,
        "greedy" => Part::Greedy,
        "logits" => Part::Logits,
        _ => Part::Hidden(part.strip_prefix("hidden.")?.parse().ok()?),
    };
    Some((index.parse().ok()?, part))
}

fn token_ids(tensor: &TensorView) -> Result<Vec<u32>, String> {
    expect(tensor, Dtype::I64)?;
    let (values, _) = tensor.data().as_chunks::<8>();
    let id = |bytes: &[u8; 8]| {
        let value = i64::from_le_bytes(*bytes);
        u32::try_from(value).map_err(|_| format!("{value} is no token id"))
    };
    values.iter().map(id).collect()
}

fn floats(tensor: &TensorView) -> Result<Vec<f32>, String> {
    expect(tensor, Dtype::F32)?;
    let (values, _) = tensor.data().as_chunks::<4>();
    Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn expect(tensor: &TensorView, dtype: Dtype) -> Result<(), String> {
    if tensor.dtype() == dtype { Ok(()) } else { Err(format!("is {:?}, not {dtype:?}", tensor.dtype())) }
}
