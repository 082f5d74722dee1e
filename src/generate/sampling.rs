//! How the next token is chosen: what a caller may ask for, and the checked numbers the engine gets.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::checkpoint::GenerationConfig;
use crate::engine::{SamplingConfig, TokenBias};
use crate::{Error, Result};

/// Sampling of one request. Every field left `None` takes the checkpoint's own value (`generation_config.json`), and
/// where the checkpoint has none, the filter is off.
///
/// A checkpoint whose `do_sample` is false or absent means greedy: then only a `temperature` given here makes the
/// request sample. Filters apply in this order: bias, penalties, minimum length, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise 0.001 to 1000.
    pub temperature: Option<f32>,
    /// Keep only so many of the likeliest tokens; 0 is off.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens that together reach this probability; above 0, at most 1, and 1 is off.
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the likeliest one; 0 (off) to 1.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of every token in the prompt or generated; 0.01 to 100, and 1
    /// is off.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens already generated; -1000 to 1000, and 0 is off.
    pub presence_penalty: Option<f32>,
    /// Subtracted once for each time a token was generated; -1000 to 1000, and 0 is off.
    pub frequency_penalty: Option<f32>,
    /// The same seed gives the same tokens, whatever else runs in the batch. Without one, a request that samples draws
    /// one at random and reports it in [`Completion::seed`](crate::Completion::seed).
    pub seed: Option<u64>,
    /// Added to the logits of single tokens; each bias -10000 to 10000, each token once.
    pub logit_bias: Vec<(u32, f32)>,
}

impl SamplingParams {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        SamplingParams { temperature: Some(0.0), ..Default::default() }
    }

    /// Checks every number, those of the checkpoint included, and fills in the missing ones. Stop tokens, minimum
    /// length and log-probabilities are the request's business and stay off.
    pub(crate) fn resolve(&self, defaults: &GenerationConfig, vocab_size: u32) -> Result<SamplingConfig> {
        let temperature = match self.temperature {
            Some(temperature) => check("temperature", temperature, "", temperature_rule)?,
            None if defaults.do_sample => {
                check("temperature", defaults.temperature.unwrap_or(1.0), CHECKPOINT, temperature_rule)?
            }
            None => 0.0,
        };
        let number = |name, own: Option<f32>, default: Option<f32>, off: f32, rule: Rule| match (own, default) {
            (Some(value), _) => check(name, value, "", rule),
            (None, Some(value)) => check(name, value, CHECKPOINT, rule),
            (None, None) => Ok(off),
        };
        let penalty: Rule = |value| (value.abs() <= 1000.0).then_some(()).ok_or("between -1000 and 1000 (0 is off)");
        Ok(SamplingConfig {
            temperature,
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0).min(vocab_size),
            top_p: number("top_p", self.top_p, defaults.top_p, 1.0, |value| {
                (value > 0.0 && value <= 1.0).then_some(()).ok_or("above 0 and at most 1 (1 is off)")
            })?,
            min_p: number("min_p", self.min_p, defaults.min_p, 0.0, |value| {
                (0.0..=1.0).contains(&value).then_some(()).ok_or("between 0 (off) and 1")
            })?,
            repetition_penalty: number(
                "repetition_penalty",
                self.repetition_penalty,
                defaults.repetition_penalty,
                1.0,
                |value| (0.01..=100.0).contains(&value).then_some(()).ok_or("between 0.01 and 100 (1 is off)"),
            )?,
            presence_penalty: number("presence_penalty", self.presence_penalty, None, 0.0, penalty)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, None, 0.0, penalty)?,
            seed: if temperature > 0.0 { self.seed.unwrap_or_else(random_seed) } else { 0 },
            logit_bias: self.checked_bias(vocab_size)?,
            ..Default::default()
        })
    }

    fn checked_bias(&self, vocab_size: u32) -> Result<Vec<TokenBias>> {
        let mut tokens = std::collections::HashSet::new();
        let checked = |&(token, bias): &(u32, f32)| {
            if token >= vocab_size {
                return Err(Error::InvalidArgument(format!(
                    "logit_bias names token {token}, but the vocabulary ends at {}",
                    vocab_size - 1
                )));
            }
            if !tokens.insert(token) {
                return Err(Error::InvalidArgument(format!("logit_bias names token {token} more than once")));
            }
            let rule: Rule = |value| (value.abs() <= 1e4).then_some(()).ok_or("between -10000 and 10000");
            Ok(TokenBias { token, bias: check(&format!("logit_bias of token {token}"), bias, "", rule)? })
        };
        self.logit_bias.iter().map(checked).collect()
    }
}

const CHECKPOINT: &str = " (from the checkpoint's generation_config.json)";

/// `Err` says which values would work.
type Rule = fn(f32) -> Result<(), &'static str>;

fn temperature_rule(value: f32) -> Result<(), &'static str> {
    let ok = value == 0.0 || (0.001..=1000.0).contains(&value);
    ok.then_some(()).ok_or("0 (greedy) or between 0.001 and 1000")
}

/// No rule admits NaN: each is a comparison that must hold.
fn check(name: &str, value: f32, origin: &str, rule: Rule) -> Result<f32> {
    let wanted = |wanted| Error::InvalidArgument(format!("{name} is {value}{origin}; it must be {wanted}"));
    rule(value).map_err(wanted)?;
    Ok(value)
}

/// Below 2^53, so that the seed survives every JSON reader on its way back.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: u32 = 100;

    fn resolve(params: SamplingParams) -> Result<SamplingConfig> {
        params.resolve(&GenerationConfig::default(), VOCAB)
    }

    #[test]
    fn nothing_asked_and_nothing_configured_is_greedy_with_all_filters_off() {
        let config = resolve(SamplingParams::default()).unwrap();
        assert_eq!((config.temperature, config.top_k, config.top_p, config.min_p), (0.0, 0, 1.0, 0.0));
        assert_eq!((config.repetition_penalty, config.presence_penalty, config.frequency_penalty), (1.0, 0.0, 0.0));
        assert_eq!(config.seed, 0);
    }

    #[test]
    fn the_checkpoint_fills_what_the_caller_left_open() {
        let defaults = GenerationConfig {
            do_sample: true,
            top_k: Some(64),
            top_p: Some(0.95),
            repetition_penalty: Some(1.1),
            ..Default::default()
        };
        let config = SamplingParams { top_p: Some(0.5), ..Default::default() }.resolve(&defaults, VOCAB).unwrap();
        assert_eq!((config.temperature, config.top_k, config.top_p), (1.0, 64, 0.5));
        assert_eq!(config.repetition_penalty, 1.1);
        assert_eq!(SamplingParams::greedy().resolve(&defaults, VOCAB).unwrap().temperature, 0.0);
    }

    #[test]
    fn a_checkpoint_that_does_not_sample_is_greedy_whatever_its_temperature() {
        let defaults = GenerationConfig { do_sample: false, temperature: Some(0.7), ..Default::default() };
        assert_eq!(SamplingParams::default().resolve(&defaults, VOCAB).unwrap().temperature, 0.0);
    }

    #[test]
    fn a_seed_is_kept_or_drawn() {
        let sampled = SamplingParams { temperature: Some(1.0), ..Default::default() };
        assert_eq!(resolve(SamplingParams { seed: Some(u64::MAX), ..sampled.clone() }).unwrap().seed, u64::MAX);
        assert_ne!(resolve(sampled.clone()).unwrap().seed, resolve(sampled).unwrap().seed);
    }

    #[test]
    fn every_bad_number_is_refused_by_name_and_value() {
        let p = SamplingParams::default;
        let cases = [
            (SamplingParams { temperature: Some(-1.0), ..p() }, "temperature is -1"),
            (SamplingParams { temperature: Some(f32::NAN), ..p() }, "temperature is NaN"),
            (SamplingParams { temperature: Some(f32::INFINITY), ..p() }, "temperature is inf"),
            (SamplingParams { top_p: Some(0.0), ..p() }, "top_p is 0"),
            (SamplingParams { top_p: Some(1.5), ..p() }, "top_p is 1.5"),
            (SamplingParams { top_p: Some(f32::NAN), ..p() }, "top_p is NaN"),
            (SamplingParams { min_p: Some(-0.1), ..p() }, "min_p is -0.1"),
            (SamplingParams { min_p: Some(1.1), ..p() }, "min_p is 1.1"),
            (SamplingParams { repetition_penalty: Some(0.0), ..p() }, "repetition_penalty is 0"),
            (SamplingParams { repetition_penalty: Some(f32::NAN), ..p() }, "repetition_penalty is NaN"),
            (SamplingParams { presence_penalty: Some(f32::INFINITY), ..p() }, "presence_penalty is inf"),
            (SamplingParams { frequency_penalty: Some(f32::NAN), ..p() }, "frequency_penalty is NaN"),
            (SamplingParams { logit_bias: vec![(100, 1.0)], ..p() }, "token 100, but the vocabulary ends at 99"),
            (SamplingParams { logit_bias: vec![(7, f32::NAN)], ..p() }, "logit_bias of token 7 is NaN"),
            (SamplingParams { logit_bias: vec![(7, 1.0), (7, 2.0)], ..p() }, "token 7 more than once"),
        ];
        for (params, expected) in cases {
            match resolve(params) {
                Err(Error::InvalidArgument(message)) => assert!(message.contains(expected), "{message}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_bad_number_of_the_checkpoint_names_its_file() {
        let defaults = GenerationConfig { top_p: Some(2.0), ..Default::default() };
        let error = SamplingParams::default().resolve(&defaults, VOCAB).unwrap_err();
        assert!(error.to_string().contains("generation_config.json"), "{error}");
    }
}
