//! What calibration has gathered, and its file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors, serialize_to_file};

use crate::engine::Observation;
use crate::error::{Error, Result};

/// Bins of [`Magnitudes`]: sixteen from one power of two to the next; bin `i` begins at the float32 with bits `i << 19`.
pub(super) const BINS: usize = 4096;
/// The first bin of what is not finite.
const NOT_FINITE: usize = 0xff << 4;

/// How large the elements of something are, in groups (one for each K/V head, else one).
#[derive(Clone, Debug, PartialEq)]
pub struct Magnitudes {
    pub(super) largest: Vec<f32>,
    pub(super) counts: Vec<u64>,
}

impl Magnitudes {
    /// Of one group's elements.
    #[cfg(test)]
    pub(super) fn of(values: &[f32]) -> Self {
        let mut counts = vec![0; BINS];
        for value in values {
            counts[(value.abs().to_bits() >> 19) as usize] += 1;
        }
        let largest = values.iter().filter(|x| x.is_finite()).fold(0.0f32, |a, b| a.max(b.abs()));
        Magnitudes { largest: vec![largest], counts }
    }

    /// The largest of each group.
    pub fn largest(&self) -> &[f32] {
        &self.largest
    }

    /// How many elements a group has in each bin.
    pub(super) fn counts(&self, group: usize) -> &[u64] {
        &self.counts[group * BINS..(group + 1) * BINS]
    }

    /// Elements of a group that are NaN or infinite.
    pub(super) fn not_finite(&self, group: usize) -> u64 {
        self.counts(group)[NOT_FINITE..].iter().sum()
    }

    /// What so many percent of all elements, of all groups, do not exceed; to a sixteenth of a power of two.
    pub fn percentile(&self, percent: f64) -> f32 {
        let groups = self.largest.len();
        (0..groups).map(|group| self.percentile_of(group, percent)).fold(0.0, f32::max)
    }

    pub(super) fn percentile_of(&self, group: usize, percent: f64) -> f32 {
        let counts = self.counts(group);
        let all: u64 = counts.iter().sum();
        let wanted = (all as f64 * percent / 100.0).ceil() as u64;
        let mut below = 0;
        for (bin, &count) in counts.iter().enumerate() {
            below += count;
            if below >= wanted && count > 0 {
                return bin_end(bin).min(self.largest[group]);
            }
        }
        self.largest[group]
    }

    fn add(&mut self, other: &Magnitudes) {
        self.largest.iter_mut().zip(&other.largest).for_each(|(mine, theirs)| *mine = mine.max(*theirs));
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
    }
}

/// Where the next bin begins.
pub(super) fn bin_end(bin: usize) -> f32 {
    f32::from_bits((bin as u32 + 1) << 19)
}

/// The magnitudes of all that FP8 has scales for.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub(super) tensors: BTreeMap<String, Magnitudes>,
    /// Of the model and the text.
    pub(super) fingerprint: u64,
    /// Sequences that went in, of how many.
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) tokens: u64,
}

impl Statistics {
    pub(super) fn new(fingerprint: u64, total: u64) -> Self {
        Statistics { tensors: BTreeMap::new(), fingerprint, done: 0, total, tokens: 0 }
    }

    /// By the name of the tensor whose scale they decide: `model.layers.0.self_attn.q_proj.input_scale` for the three that
    /// share the input, `model.layers.0.self_attn.k_scale` with a group for each K/V head.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Magnitudes)> {
        self.tensors.iter().map(|(name, magnitudes)| (name.as_str(), magnitudes))
    }

    /// Of the tensor whose scale this name stands for, such as `model.layers.0.mlp.down_proj.input_scale`.
    pub fn get(&self, name: &str) -> Option<&Magnitudes> {
        self.tensors.get(name)
    }

    /// Tokens that went in.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether all of the text went in.
    pub fn is_complete(&self) -> bool {
        self.done == self.total
    }

    /// These and what an engine has gathered besides.
    pub(super) fn with(&self, observations: Vec<Observation>) -> Statistics {
        let mut sum = self.clone();
        for Observation { name, largest, counts } in observations {
            let more = Magnitudes { largest, counts };
            match sum.tensors.get_mut(&name) {
                Some(mine) => mine.add(&more),
                None => {
                    sum.tensors.insert(name, more);
                }
            }
        }
        sum
    }

    /// Writes a file that [`Statistics::read`] reads, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut views = Vec::new();
        for (name, Magnitudes { largest, counts }) in &self.tensors {
            let bytes = largest.iter().flat_map(|x| x.to_le_bytes()).collect();
            views.push((format!("{name}.largest"), Part { dtype: Dtype::F32, shape: vec![largest.len()], bytes }));
            let bytes = counts.iter().flat_map(|x| x.to_le_bytes()).collect();
            let shape = vec![largest.len(), BINS];
            views.push((format!("{name}.counts"), Part { dtype: Dtype::U64, shape, bytes }));
        }
        let numbers =
            [("fingerprint", self.fingerprint), ("done", self.done), ("total", self.total), ("tokens", self.tokens)];
        let mut metadata: HashMap<String, String> =
            numbers.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect();
        metadata.insert("format".into(), FORMAT.into());
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = Path::new(&partial).to_owned();
        let io = |error: safetensors::SafeTensorError| Error::io(&partial, std::io::Error::other(error.to_string()));
        serialize_to_file(views, Some(metadata), &partial).map_err(io)?;
        std::fs::rename(&partial, path).map_err(|source| Error::io(path, source))
    }

    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Checkpoint`] if it is something else.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
        let wrong = || Error::checkpoint(path, "is not a file of calibration statistics of this version");
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|_| wrong())?;
        let metadata = header.metadata().clone().ok_or_else(wrong)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|_| wrong())?;
        let number = |name| metadata.get(name).and_then(|text: &String| text.parse().ok()).ok_or_else(wrong);
        if metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(wrong());
        }
        let mut statistics = Statistics::new(number("fingerprint")?, number("total")?);
        (statistics.done, statistics.tokens) = (number("done")?, number("tokens")?);
        for (name, counted) in file.tensors() {
            let Some(name) = name.strip_suffix(".counts") else { continue };
            let largest = file.tensor(&format!("{name}.largest")).map_err(|_| wrong())?;
            let words = |bytes: &[u8]| bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
            let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let magnitudes = Magnitudes { largest: floats(largest.data()), counts: words(counted.data()) };
            if magnitudes.largest.is_empty() || magnitudes.counts.len() != magnitudes.largest.len() * BINS {
                return Err(wrong());
            }
            statistics.tensors.insert(name.to_owned(), magnitudes);
        }
        Ok(statistics)
    }
}

const FORMAT: &str = "gemma-cuda calibration 1";

struct Part {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Part {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_bin() {
        let values: Vec<f32> = (1..=1000).map(|i| i as f32).collect();
        let found = Magnitudes::of(&values);
        assert_eq!(found.percentile(100.0), 1000.0);
        for percent in [10.0, 50.0, 99.0] {
            let exact = 10.0 * percent as f32;
            let got = found.percentile(percent);
            assert!((exact..=exact * 1.07).contains(&got), "{percent} %: {got}");
        }
        assert_eq!(Magnitudes::of(&[0.0; 7]).percentile(99.0), 0.0);
        assert_eq!(Magnitudes::of(&[1.0, f32::NAN, f32::INFINITY]).not_finite(0), 2);
    }

    #[test]
    fn the_file_holds_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("statistics");
        let observation = |largest: f32| Observation {
            name: "model.layers.0.self_attn.k_scale".into(),
            largest: vec![largest, 2.0],
            counts: (0..2 * BINS as u64).collect(),
        };
        let mut statistics = Statistics::new(u64::MAX, 7).with(vec![observation(1.0)]).with(vec![observation(3.0)]);
        (statistics.done, statistics.tokens) = (5, 1234);
        assert_eq!(statistics.get("model.layers.0.self_attn.k_scale").unwrap().largest(), [3.0, 2.0]);
        statistics.write(&path).unwrap();
        assert_eq!(Statistics::read(&path).unwrap(), statistics);
        std::fs::write(&path, "else").unwrap();
        assert!(Statistics::read(&path).unwrap_err().to_string().contains("not a file of calibration statistics"));
    }
}
