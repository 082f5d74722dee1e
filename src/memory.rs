//! Whether a model fits the machine's memory, before any of it is taken.

use crate::engine::MemoryBudget;
use crate::options::bytes_text;
use crate::{Error, Result};

/// For an engine that lives in the machine's own memory. Where the system does not say what is available, the
/// allocator has the last word.
pub(crate) fn check_host(budget: &MemoryBudget) -> Result<()> {
    match available() {
        Some(available) => check(budget, available),
        None => Ok(()),
    }
}

fn check(budget: &MemoryBudget, available: u64) -> Result<()> {
    let parts = [budget.weights, budget.kv_cache, budget.activations, budget.logits];
    let needed = parts.iter().fold(0u64, |sum, &part| sum.saturating_add(part));
    if needed <= available {
        return Ok(());
    }
    let [weights, kv_cache, activations, logits] = parts.map(bytes_text);
    Err(Error::Device(format!(
        "the model needs {} of memory (weights {weights}, KV cache {kv_cache}, activations {activations}, logits \
         {logits}), but {} are available; a smaller KV cache or batch needs less",
        bytes_text(needed),
        bytes_text(available)
    )))
}

/// Bytes that can be taken without swapping, as Linux reckons.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_refused_with_the_numbers() {
        let budget = MemoryBudget { weights: 5 << 30, kv_cache: 1 << 30, activations: 1 << 20, logits: 1 << 20 };
        assert!(check(&budget, 7 << 30).is_ok());
        let message = check(&budget, 4 << 30).unwrap_err().to_string();
        for part in ["6.0 GiB", "weights 5.0 GiB", "KV cache 1.0 GiB", "4.0 GiB are available"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(check(&MemoryBudget { weights: u64::MAX, ..budget }, 4 << 30).is_err());
    }
}
