//! What is run: fixed numbers of requests and tokens, the same for every program that is compared
//! (benches/hf_baseline.py has them too).

use clap::ValueEnum;
use gemma_cuda::{Request, SamplingParams};
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    Seed,
    Tutorial,
    Single,
    Mixed,
    Prefill,
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    pub prompt: usize,
    pub new: usize,
}

impl Workload {
    /// At most `most_new` new tokens each.
    pub fn requests(self, most_new: usize) -> Vec<Lengths> {
        let mut requests = self.whole();
        requests.iter_mut().for_each(|request| request.new = request.new.min(most_new));
        requests
    }

    fn whole(self) -> Vec<Lengths> {
        // Evenly from the lowest to the highest, in an order that mixes them.
        let spread = |i: usize, of: usize, low: usize, high: usize| low + i * 37 % of * (high - low) / (of - 1).max(1);
        match self {
            Workload::Seed => (0..64).map(|i| Lengths { prompt: spread(i, 64, 1, 128), new: 896 }).collect(),
            Workload::Tutorial => (0..64).map(|i| Lengths { prompt: spread(i, 64, 1, 20), new: 492 }).collect(),
            Workload::Single => vec![Lengths { prompt: 128, new: 512 }],
            Workload::Mixed => (0..256)
                .map(|i| Lengths { prompt: spread(i, 256, 16, 512), new: spread(i * 5 + 11, 256, 16, 512) })
                .collect(),
            Workload::Prefill => vec![Lengths { prompt: 4096, new: 1 }; 8],
        }
    }
}

/// Ids from 3 on, below 10,000.
pub fn prompt(request: usize, length: usize, vocab_size: u32) -> Vec<u32> {
    let ids = vocab_size.clamp(4, 10_003) - 3;
    (0..length).map(|t| (request * 7919 + t * 104_729) as u32 % ids + 3).collect()
}

/// Greedy, and nothing but the number of tokens ends it.
pub fn greedy(prompt: Vec<u32>, new: usize) -> Request {
    Request::new(prompt).max_new_tokens(new).ignore_eos(true).sampling(SamplingParams::greedy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_reach_from_the_lowest_to_the_highest() {
        let range = |workload: Workload, of: fn(&Lengths) -> usize| {
            let lengths: Vec<usize> = workload.requests(usize::MAX).iter().map(of).collect();
            (lengths.len(), *lengths.iter().min().unwrap(), *lengths.iter().max().unwrap())
        };
        assert_eq!(range(Workload::Seed, |r| r.prompt), (64, 1, 128));
        assert_eq!(range(Workload::Tutorial, |r| r.prompt), (64, 1, 20));
        assert_eq!(range(Workload::Mixed, |r| r.prompt), (256, 16, 512));
        assert_eq!(range(Workload::Mixed, |r| r.new), (256, 16, 512));
        assert_eq!(Workload::Single.requests(7), [Lengths { prompt: 128, new: 7 }]);
    }

    #[test]
    fn prompts_stay_in_the_vocabulary() {
        for vocab in [1000, 256_000] {
            let prompt = prompt(255, 4096, vocab);
            assert!(prompt.iter().all(|&id| (3..vocab.min(10_003)).contains(&id)));
        }
    }
}
