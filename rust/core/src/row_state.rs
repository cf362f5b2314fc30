//! What is known of a row of logits while its blocks come in, and what they amount to in the end.
use crate::math::{exp, ln};
use crate::simd::WIDTH;
use crate::token_selection::Selection;

/// Columns whose sums are taken in float32; tiles start at multiples of it.
pub const BLOCK: usize = 1024;

/// What is known of a row so far.
#[derive(Debug, Clone)]
pub(crate) struct RowState {
    peak: f32,
    /// Of `exp(d)`, `exp(d) d` and `exp(d)^2`, relative to the peak.
    sums: [f64; 3],
    target: f32,
    is_top1: bool,
    /// Further tokens, where some are asked for.
    pub(crate) selection: Option<Box<Selection>>,
}

impl RowState {
    pub(crate) const NEW: Self =
        Self { peak: f32::NEG_INFINITY, sums: [0.0; 3], target: f32::NAN, is_top1: false, selection: None };

    /// Takes note of a block's largest logit and, where they are there, of the target and of other tokens that are asked for;
    /// what the block is relative to.
    #[inline]
    pub(crate) fn meet(&mut self, peak: f32, line: &[f32], first: usize, target: usize) -> f32 {
        let rises = peak > self.peak;
        if rises {
            self.is_top1 = false;
        }
        if let Some(&z) = target.checked_sub(first).and_then(|place| line.get(place)) {
            self.target = z;
            self.is_top1 = rises && z == peak && line.iter().position(|other| *other == peak) == Some(target - first);
        }
        if let Some(selection) = &mut self.selection {
            selection.meet(peak, line, first);
        }
        if rises {
            self.rescale(peak);
        }
        // Nothing but -infinity and NaN so far: relative to zero, the former count nothing.
        if self.peak == f32::NEG_INFINITY { 0.0 } else { self.peak }
    }

    fn rescale(&mut self, peak: f32) {
        if self.peak > f32::NEG_INFINITY {
            let delta = f64::from(self.peak) - f64::from(peak);
            let factor = exp(delta);
            let [sum, weighted, squares] = self.sums;
            // Where the factor is zero delta may be infinite.
            let shifted = if factor > 0.0 { weighted + sum * delta } else { sum };
            self.sums = [sum * factor, shifted * factor, squares * factor * factor];
        }
        self.peak = peak;
    }

    #[inline]
    pub(crate) fn add(&mut self, lanes: &[[f32; WIDTH]; 3]) {
        for (sum, lanes) in self.sums.iter_mut().zip(lanes) {
            *sum += lanes.iter().fold(0.0, |sum, lane| sum + f64::from(*lane));
        }
    }

    /// What the blocks so far amount to.
    pub(crate) fn finish(&self) -> Row {
        let [sum, weighted, squares] = self.sums;
        if self.peak == f32::NEG_INFINITY || !sum.is_finite() {
            return Row::NAN;
        }
        let log_sum = ln(sum);
        Row {
            logprob: logprob(self.target, self.peak, log_sum),
            entropy: (log_sum - weighted / sum) as f32,
            log_sum_p_squared: (ln(squares) - 2.0 * log_sum) as f32,
            is_top1: self.is_top1,
            peak: self.peak,
            log_sum: log_sum as f32,
            exact_log_sum: log_sum,
        }
    }
}

fn logprob(logit: f32, peak: f32, log_sum: f64) -> f32 {
    ((f64::from(logit) - f64::from(peak)) - log_sum) as f32
}

/// A row's statistics.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) logprob: f32,
    pub(crate) entropy: f32,
    pub(crate) log_sum_p_squared: f32,
    pub(crate) is_top1: bool,
    pub(crate) peak: f32,
    pub(crate) log_sum: f32,
    exact_log_sum: f64,
}

impl Row {
    const NAN: Self = Self {
        logprob: f32::NAN,
        entropy: f32::NAN,
        log_sum_p_squared: f32::NAN,
        is_top1: false,
        peak: f32::NAN,
        log_sum: f32::NAN,
        exact_log_sum: f64::NAN,
    };

    /// Log-probability of a token of the row.
    pub(crate) fn logprob_of(&self, logit: f32) -> f32 {
        logprob(logit, self.peak, self.exact_log_sum)
    }
}
