//! From magnitudes to scales.

use std::str::FromStr;

use half::bf16;

use super::statistics::{BINS, Magnitudes, bin_end};
use crate::engine::{DType, quantize_e4m3};
use crate::error::{Error, Result};

/// The largest E4M3.
const LARGEST: f32 = 448.0;

/// What of the activations the largest FP8 number stands for. Anything larger saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Method {
    /// The largest magnitude there was.
    #[default]
    Largest,
    /// What so many percent of all elements do not exceed.
    Percentile(f64),
    /// Where the sum of the squared errors is least.
    LeastSquares,
    /// Nothing of it: every scale is 1. To show what calibration is for.
    One,
}

impl FromStr for Method {
    type Err = Error;

    /// `largest`, `percentile=99.99`, `mse` or `one`.
    fn from_str(text: &str) -> Result<Self> {
        let percent = text.strip_prefix("percentile=").and_then(|number| number.parse().ok());
        match (text, percent) {
            ("largest", _) => Ok(Method::Largest),
            ("mse", _) => Ok(Method::LeastSquares),
            ("one", _) => Ok(Method::One),
            (_, Some(percent)) if percent > 0.0 && percent <= 100.0 => Ok(Method::Percentile(percent)),
            _ => Err(Error::InvalidArgument(format!(
                "unknown calibration method {text:?}; use largest, percentile=99.99 (above 0, up to 100), mse or one"
            ))),
        }
    }
}

impl Method {
    /// A scale for each group of `magnitudes`, which are those of `name`.
    pub(super) fn scales(self, name: &str, magnitudes: &Magnitudes) -> Result<Vec<f32>> {
        (0..magnitudes.largest.len()).map(|group| self.scale(name, magnitudes, group)).collect()
    }

    fn scale(self, name: &str, magnitudes: &Magnitudes, group: usize) -> Result<f32> {
        match magnitudes.not_finite(group) {
            0 => {}
            count => {
                return Err(Error::InvalidArgument(format!(
                    "{name}: {count} activations were NaN or infinite; no scale can be made of that. Check the model with \
                     `inspect --check`"
                )));
            }
        }
        match self {
            Method::Largest => Ok(scale_for(magnitudes.largest[group])),
            Method::Percentile(percent) => Ok(scale_for(magnitudes.percentile_of(group, percent))),
            Method::LeastSquares => least_squares(magnitudes, group),
            Method::One => Ok(1.0),
        }
    }
}

/// The scale with which `limit` becomes the largest FP8 number, or a little less: it is a number that bf16 holds too,
/// because some loaders keep scales in the model's own type. 1 where there is nothing but zeros.
pub(super) fn scale_for(limit: f32) -> f32 {
    if limit == 0.0 {
        return 1.0;
    }
    let scale = (limit / LARGEST).max(f32::MIN_POSITIVE);
    let down = bf16::from_bits((scale.to_bits() >> 16) as u16);
    if down.to_f32() == scale { scale } else { bf16::from_bits(down.to_bits() + 1).to_f32() }
}

/// Tries every bin's end within six powers of two below the largest as the limit.
fn least_squares(magnitudes: &Magnitudes, group: usize) -> Result<f32> {
    let largest = magnitudes.largest[group];
    let top = (largest.to_bits() >> 19) as usize;
    // The middle of a bin stands for what is in it.
    let middles: Vec<(f64, f64)> = (0..BINS)
        .map(|bin| (f64::from(f32::from_bits((bin as u32) << 19 | 1 << 18)), magnitudes.counts(group)[bin] as f64))
        .filter(|&(_, count)| count > 0.0)
        .collect();
    let bytes: Vec<u8> = middles.iter().flat_map(|&(middle, _)| (middle as f32).to_le_bytes()).collect();
    let mut best = (f64::INFINITY, scale_for(largest));
    for bin in top.saturating_sub(96)..=top {
        let scale = scale_for(bin_end(bin).min(largest));
        let codes = quantize_e4m3(DType::F32, &bytes, &[scale])?;
        let error = |(&(middle, count), &code): (&(f64, f64), &u8)| {
            count * (f64::from(e4m3_to_f32(code)) * f64::from(scale) - middle).powi(2)
        };
        let sum: f64 = middles.iter().zip(&codes).map(error).sum();
        if sum < best.0 {
            best = (sum, scale);
        }
    }
    Ok(best.1)
}

/// What a finite code means.
fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_what_bf16_holds_and_lets_nothing_saturate() {
        for limit in [1e-30f32, 0.1, 1.0, 448.0, 449.0, 1234.5, 3e38] {
            let scale = scale_for(limit);
            assert_eq!(bf16::from_f32(scale).to_f32(), scale);
            assert!(limit / scale <= LARGEST && limit / scale > LARGEST * 0.99, "{limit}");
        }
        assert_eq!(scale_for(448.0), 1.0);
        assert_eq!(scale_for(0.0), 1.0);
        assert!(scale_for(1e-44) > 0.0);
    }

    #[test]
    fn methods() {
        let mut values: Vec<f32> = (0..100_000).map(|i| (i % 1000) as f32 / 1000.0).collect();
        values.push(5000.0);
        let found = Magnitudes::of(&values);
        let scale = |method: Method| method.scale("x", &found, 0).unwrap();
        assert_eq!(scale(Method::Largest), scale_for(5000.0));
        assert!(scale(Method::Percentile(99.9)) <= scale_for(1.07));
        assert_eq!(scale(Method::One), 1.0);
        // One outlier costs more where it saturates than all others lose by the coarser scale.
        assert!(scale(Method::LeastSquares) > scale_for(4000.0));
        let heavy = Magnitudes::of(&values[..100_000]);
        assert!(Method::LeastSquares.scale("x", &heavy, 0).unwrap() <= scale_for(1.0));
        let broken = Magnitudes::of(&[1.0, f32::NAN]);
        assert!(
            Method::Largest.scale("layer.x", &broken, 0).unwrap_err().to_string().contains("layer.x: 1 activations")
        );
    }

    #[test]
    fn names_of_methods() {
        assert_eq!("percentile=99.9".parse::<Method>().unwrap(), Method::Percentile(99.9));
        assert_eq!("mse".parse::<Method>().unwrap(), Method::LeastSquares);
        for wrong in ["max", "percentile", "percentile=0", "percentile=101", "percentile=x"] {
            assert!(wrong.parse::<Method>().unwrap_err().to_string().contains("percentile=99.99"));
        }
    }

    #[test]
    fn codes_mean_what_the_engine_means() {
        let values: Vec<f32> = (0..126u8).map(e4m3_to_f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(quantize_e4m3(DType::F32, &bytes, &[1.0]).unwrap(), (0..126).collect::<Vec<u8>>());
    }
}
