//! Distances between what was computed and what should have been.

use serde::Serialize;

/// Distance of logits from the reference's. Infinite where the engine's numbers are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LogitError {
    /// Positions compared.
    pub rows: usize,
    /// Largest difference of a logit.
    pub max_abs: f64,
    /// L2 norm of all differences over that of all golden logits.
    pub rel_l2: f64,
    /// Kullback-Leibler divergence of the engine's distribution from the reference's, in nats: mean over the rows.
    pub mean_kl: f64,
    /// The row where it is largest.
    pub max_kl: f64,
    /// Share of rows whose likeliest token is the reference's, 0 to 1.
    pub argmax_agreement: f64,
}

/// Distance of one layer's output from the reference's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HiddenError {
    /// 0 for the scaled embeddings, then the layers.
    pub layer: usize,
    /// Largest difference.
    pub max_abs: f64,
    /// Euclidean distance, relative to the length of the golden ones.
    pub rel_l2: f64,
}

/// Differences and golden values, added up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Distance {
    max_abs: f64,
    squares: f64,
    golden_squares: f64,
}

impl Distance {
    pub fn add(&mut self, golden: &[f32], ours: &[f32]) {
        for (&golden, &ours) in golden.iter().zip(ours) {
            let difference = f64::from(ours) - f64::from(golden);
            self.max_abs = self.max_abs.max(infinite_if_nan(difference.abs()));
            self.squares += infinite_if_nan(difference * difference);
            self.golden_squares += f64::from(golden) * f64::from(golden);
        }
    }

    fn merge(&mut self, other: &Distance) {
        self.max_abs = self.max_abs.max(other.max_abs);
        self.squares += other.squares;
        self.golden_squares += other.golden_squares;
    }

    fn rel_l2(&self) -> f64 {
        if self.squares == 0.0 { 0.0 } else { (self.squares / self.golden_squares).sqrt() }
    }

    pub fn of_layer(&self, layer: usize) -> HiddenError {
        HiddenError { layer, max_abs: self.max_abs, rel_l2: self.rel_l2() }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct LogitStats {
    distance: Distance,
    rows: usize,
    kl_sum: f64,
    kl_max: f64,
    agreeing: usize,
}

impl LogitStats {
    pub fn add_row(&mut self, golden: &[f32], ours: &[f32]) {
        self.distance.add(golden, ours);
        let kl = infinite_if_nan(kl_divergence(golden, ours));
        self.kl_sum += kl;
        self.kl_max = self.kl_max.max(kl);
        self.agreeing += usize::from(argmax(golden) == argmax(ours));
        self.rows += 1;
    }

    pub fn merge(&mut self, other: &LogitStats) {
        self.distance.merge(&other.distance);
        self.kl_sum += other.kl_sum;
        self.kl_max = self.kl_max.max(other.kl_max);
        self.agreeing += other.agreeing;
        self.rows += other.rows;
    }

    /// `None` without a row.
    pub fn error(&self) -> Option<LogitError> {
        let rows = self.rows as f64;
        (self.rows > 0).then(|| LogitError {
            rows: self.rows,
            max_abs: self.distance.max_abs,
            rel_l2: self.distance.rel_l2(),
            mean_kl: self.kl_sum / rows,
            max_kl: self.kl_max,
            argmax_agreement: self.agreeing as f64 / rows,
        })
    }
}

/// `f64::max` would drop a NaN, and with it the worst error there is.
fn infinite_if_nan(value: f64) -> f64 {
    if value.is_nan() { f64::INFINITY } else { value }
}

/// Sum of p (ln p - ln q), where p are the golden and q our probabilities.
fn kl_divergence(golden: &[f32], ours: &[f32]) -> f64 {
    let (golden_norm, our_norm) = (log_sum_exp(golden), log_sum_exp(ours));
    let terms = golden.iter().zip(ours).map(|(&golden, &ours)| {
        let (ln_p, ln_q) = (f64::from(golden) - golden_norm, f64::from(ours) - our_norm);
        ln_p.exp() * (ln_p - ln_q)
    });
    let sum: f64 = terms.sum();
    if sum < 0.0 { 0.0 } else { sum } // rounding; a NaN stays
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln()
}

/// The first of the largest.
fn argmax(row: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (index, value) in row.iter().enumerate() {
        if best.is_none_or(|best| *value > row[best]) {
            best = Some(index);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_have_no_distance() {
        let mut stats = LogitStats::default();
        stats.add_row(&[1.0, 2.0, -3.0], &[1.0, 2.0, -3.0]);
        let error = stats.error().unwrap();
        assert_eq!((error.max_abs, error.rel_l2, error.mean_kl, error.argmax_agreement), (0.0, 0.0, 0.0, 1.0));
    }

    #[test]
    fn distances_of_known_rows() {
        let mut stats = LogitStats::default();
        // p = (1/2, 1/2), q = (3/4, 1/4): KL = ln(2/3)/2 + ln(2)/2.
        stats.add_row(&[0.0, 0.0], &[3f32.ln(), 0.0]);
        let expected = 0.5 * (2.0f64 / 3.0).ln() + 0.5 * 2.0f64.ln();
        let error = stats.error().unwrap();
        assert!((error.mean_kl - expected).abs() < 1e-7, "{error:?}");
        assert!((error.max_abs - 3.0f64.ln()).abs() < 1e-6);
        stats.add_row(&[3.0, 4.0], &[3.0, 3.0]);
        let error = stats.error().unwrap();
        assert_eq!((error.rows, error.argmax_agreement), (2, 0.5));
        assert!((error.rel_l2 - ((3f64.ln().powi(2) + 1.0) / 25.0).sqrt()).abs() < 1e-7);
    }

    #[test]
    fn a_nan_is_the_worst_error_and_not_none() {
        let mut stats = LogitStats::default();
        stats.add_row(&[1.0, 2.0], &[1.0, f32::NAN]);
        stats.add_row(&[1.0, 2.0], &[1.0, 2.0]);
        let error = stats.error().unwrap();
        assert!(error.max_abs.is_infinite() && error.rel_l2.is_infinite() && error.mean_kl.is_infinite());
    }
}
