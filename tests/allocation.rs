//! Damaged checkpoints must not make the loader allocate more than their files justify. Alone in its binary, because
//! it counts the allocations of the whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use gemma_cuda::checkpoint::Checkpoint;
use proptest::prelude::*;
use serde_json::{Value, json};

struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(size: isize) {
    if size > 0 {
        LARGEST.set(LARGEST.get().max(size as usize));
    }
    LIVE.set(LIVE.get() + size);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain cells and allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens a checkpoint; returns the largest single allocation and the peak of all that were live, in bytes.
fn open(dir: &Path) -> (usize, isize, bool) {
    let before = LIVE.get();
    LARGEST.set(0);
    PEAK.set(before);
    let whole = Checkpoint::open(dir).is_ok();
    (LARGEST.get(), PEAK.get() - before, whole)
}

const MODEL: &str = "gemma3-nested";

struct Case {
    dir: tempfile::TempDir,
    config: Vec<u8>,
    weights: Vec<u8>,
    header: usize,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let golden: std::path::PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/golden/tiny", MODEL].iter().collect();
        let config = std::fs::read(golden.join("config.json")).unwrap();
        let weights = std::fs::read(golden.join("model.safetensors")).unwrap();
        let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        let case = Case { dir, config, weights, header };
        case.write(&case.config, &case.weights);
        case
    }

    fn write(&self, config: &[u8], weights: &[u8]) {
        std::fs::write(self.dir.path().join("config.json"), config).unwrap();
        std::fs::write(self.dir.path().join("model.safetensors"), weights).unwrap();
    }

    /// What the files justify: a parsed header or config is some words a byte; the tensors themselves are mapped.
    fn check(&self, what: &str) {
        let (largest, peak, _) = open(self.dir.path());
        let text = self.header + self.config.len();
        assert!(largest <= 8 * text, "{what}: one allocation of {largest} bytes for {text} bytes of text");
        assert!(peak <= 64 * text as isize, "{what}: {peak} bytes at once for {text} bytes of text");
    }
}

#[test]
fn a_whole_checkpoint_is_not_copied() {
    let case = Case::new();
    assert!(open(case.dir.path()).2);
    case.check("undamaged");
}

/// Every number of the config in turn, as large as its type allows.
#[test]
fn huge_numbers_in_the_config() {
    let case = Case::new();
    let config: Value = serde_json::from_slice(&case.config).unwrap();
    let mut paths = Vec::new();
    numbers(&config, String::new(), &mut paths);
    assert!(paths.len() > 10, "{paths:?}");
    for path in &paths {
        for value in [json!(100_000), json!(u32::MAX), json!(u64::MAX), json!(1e300), json!(-1)] {
            let mut changed = config.clone();
            *changed.pointer_mut(path).unwrap() = value.clone();
            // Named layer types would give a wrong count of layers away before it is used.
            changed["text_config"].as_object_mut().map(|text| text.remove("layer_types"));
            case.write(changed.to_string().as_bytes(), &case.weights);
            case.check(&format!("{path} = {value}"));
        }
    }
}

fn numbers(value: &Value, path: String, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(path),
        Value::Object(map) => map.iter().for_each(|(key, value)| numbers(value, format!("{path}/{key}"), found)),
        _ => {}
    }
}

#[test]
fn a_header_longer_than_its_file() {
    let case = Case::new();
    for length in [1 << 20, 99_999_999, 1 << 40, u64::MAX] {
        let mut weights = case.weights.clone();
        weights[..8].copy_from_slice(&length.to_le_bytes());
        case.write(&case.config, &weights);
        case.check(&format!("header of {length}"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_headers(at in any::<prop::sample::Index>(), text in "[0-9eE.\"{}\\[\\],:A-Z]{1,8}") {
        let case = Case::new();
        let mut weights = case.weights.clone();
        let at = 8 + at.index(case.header - text.len());
        weights[at..at + text.len()].copy_from_slice(text.as_bytes());
        case.write(&case.config, &weights);
        case.check(&text);
    }

    #[test]
    fn damaged_configs(at in any::<prop::sample::Index>(), text in "[0-9eE.\\-\"{}\\[\\],:]{1,12}") {
        let case = Case::new();
        let mut config = case.config.clone();
        let at = at.index(config.len());
        config.splice(at..(at + text.len() / 2).min(config.len()), text.bytes());
        case.write(&config, &case.weights);
        case.check(&text);
    }
}
