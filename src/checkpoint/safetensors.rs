//! The weights on disk: one safetensors file, or shards behind an index, mapped into memory and checked before any
//! weight is read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::fields::read_object;
use crate::engine::{DType, canonical_tensor_name};
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// One tensor as a file holds it.
pub(super) struct Stored {
    /// The name in the file.
    pub name: String,
    /// The name in the model, `None` for tensors that text generation leaves aside.
    pub canonical: Option<String>,
    pub dtype: DType,
    /// As the file says, of whatever type.
    pub file_dtype: Dtype,
    pub shape: Vec<u64>,
    file: usize,
    bytes: Range<usize>,
}

/// The mapped files of a checkpoint.
pub(super) struct Files {
    files: Vec<(PathBuf, Mmap)>,
    /// In file order.
    pub tensors: Vec<Stored>,
}

impl Files {
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let mut files = Files { files: Vec::new(), tensors: Vec::new() };
        if single.exists() {
            files.add(&single)?;
        } else if index.exists() {
            let wanted = read_index(&index)?;
            let shards: std::collections::BTreeSet<&String> = wanted.values().collect();
            for shard in shards {
                files.add(&dir.join(shard))?;
            }
            files.match_index(&index, &wanted)?;
        } else {
            return Err(Error::checkpoint(dir, format!("holds neither {SINGLE} nor {INDEX}")));
        }
        files.refuse_duplicates()?;
        Ok(files)
    }

    pub fn path(&self, tensor: &Stored) -> &Path {
        &self.files[tensor.file].0
    }

    pub fn bytes(&self, tensor: &Stored) -> &[u8] {
        &self.files[tensor.file].1[tensor.bytes.clone()]
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let map = map_file(path)?;
        let wrong = |message: String| Error::checkpoint(path, message);
        let (header_len, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| wrong(format!("not a valid safetensors file: {error}")))?;
        if let Some(name) = repeated_name(&map[8..8 + header_len]) {
            return Err(wrong(format!("its header names tensor {name} twice")));
        }
        let file = self.files.len();
        for name in metadata.offset_keys() {
            let info = metadata.info(&name).expect("a name the metadata just listed");
            let canonical = canonical_tensor_name(&name).filter(|name| !name.ends_with(".rotary_emb.inv_freq"));
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::BF16 => DType::BF16,
                Dtype::F16 => DType::F16,
                Dtype::F8_E4M3 => DType::E4M3,
                _ if canonical.is_none() => DType::F32, // never read
                other => {
                    return Err(wrong(format!("tensor {name} is {other:?}; BF16, F16, F32 and F8_E4M3 can be loaded")));
                }
            };
            let start = 8 + header_len;
            self.tensors.push(Stored {
                canonical,
                dtype,
                file_dtype: info.dtype,
                shape: info.shape.iter().map(|&extent| extent as u64).collect(),
                file,
                bytes: start + info.data_offsets.0..start + info.data_offsets.1,
                name,
            });
        }
        self.files.push((path.to_owned(), map));
        Ok(())
    }

    /// The shards hold what the index says, where it says, and nothing else.
    fn match_index(&self, index: &Path, wanted: &BTreeMap<String, String>) -> Result<()> {
        let wrong = |message: String| Err(Error::checkpoint(index, message));
        let mut found = HashSet::new();
        for tensor in &self.tensors {
            let shard = self.path(tensor).file_name().unwrap_or_default().to_string_lossy();
            match wanted.get(&tensor.name) {
                Some(file) if *file == shard => found.insert(tensor.name.as_str()),
                Some(file) => return wrong(format!("places tensor {} in {file}, but {shard} has it", tensor.name)),
                None => return wrong(format!("does not name tensor {} of {shard}", tensor.name)),
            };
        }
        match wanted.iter().find(|(name, _)| !found.contains(name.as_str())) {
            Some((name, file)) => wrong(format!("places tensor {name} in {file}, which lacks it")),
            None => Ok(()),
        }
    }

    fn refuse_duplicates(&self) -> Result<()> {
        let mut seen: HashMap<&str, &Stored> = HashMap::new();
        for tensor in &self.tensors {
            let Some(canonical) = &tensor.canonical else { continue };
            if let Some(first) = seen.insert(canonical, tensor) {
                return Err(Error::checkpoint(
                    self.path(tensor),
                    format!("tensor {} is also there as {} in {}", tensor.name, first.name, self.path(first).display()),
                ));
            }
        }
        Ok(())
    }
}

/// Tensor name -> shard.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let index = read_object(path)?;
    let wrong = |message: String| Error::checkpoint(path, message);
    let map = index
        .get("weight_map")
        .and_then(|map| map.as_object())
        .ok_or_else(|| wrong("has no object `weight_map`".into()))?;
    let mut wanted = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().ok_or_else(|| wrong(format!("the file of tensor {name} is not a string")))?;
        if Path::new(file).file_name().is_none_or(|name| name != file) {
            return Err(wrong(format!("places tensor {name} in {file:?}; shards stand beside the index")));
        }
        wanted.insert(name.clone(), file.to_owned());
    }
    Ok(wanted)
}

/// Maps a file for reading.
#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    let metadata = file.metadata().map_err(|source| Error::io(path, source))?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(Error::checkpoint(path, "is empty or not a file"));
    }
    // SAFETY: the map is only read. That nobody changes or shortens the file meanwhile cannot be enforced; like every
    // loader of mapped checkpoints we rely on it.
    unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))
}

/// The first key that a JSON object has twice; a plain map would silently keep the last.
fn repeated_name(header: &[u8]) -> Option<String> {
    struct Names(Option<String>);

    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut seen = HashSet::new();
            while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                if !seen.insert(name.clone()) {
                    self.0.get_or_insert(name);
                }
            }
            Ok(self.0)
        }
    }

    serde_json::Deserializer::from_slice(header).deserialize_map(Names(None)).ok().flatten()
}
