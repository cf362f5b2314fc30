//! Elementary functions in float64, by `+ - * /` alone: the standard library's differ between machines.
use std::f64::consts::{LN_2, LOG2_E, SQRT_2};

/// Natural logarithm of a normal number `x > 0`.
///
/// `x = m 2^e` with `m` in `[sqrt(1/2), sqrt(2))`, and `ln m = 2 artanh(s)` with `s = (m - 1) / (m + 1)`, `|s| < 0.1716`. The
/// series stops at `s^21`; what is left out is below `s^22 / 23 < 1e-18` of the sum.
pub(crate) fn ln(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let (mut exponent, mut m) =
        (f64::from((bits >> 52) as u32) - 1023.0, f64::from_bits(bits & MANTISSA | 1.0_f64.to_bits()));
    if m >= SQRT_2 {
        (exponent, m) = (exponent + 1.0, m / 2.0);
    }
    let s = (m - 1.0) / (m + 1.0);
    let series = (0..=10).rev().fold(0.0, |sum, k| sum * (s * s) + 1.0 / f64::from(2 * k + 1));
    exponent * LN_2 + 2.0 * s * series
}

/// Exponential function of `x <= 0`; 0 below -700, NaN for NaN.
///
/// `x = n ln 2 + r` with `|r| < 0.3466`, and Taylor's series for `r` stops at `r^14`: what is left out is below 1e-19.
pub(crate) fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    let n = (x * LOG2_E + 0.5).floor();
    let r = x - n * LN_2;
    let series = (1..=14).rev().fold(1.0, |sum, k| 1.0 + r / f64::from(k) * sum);
    series * f64::from_bits(((n + 1023.0) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_that_of_std() {
        for i in 0..100_000 {
            let x = -f64::from(i) * 0.007_001;
            let (actual, expected) = (exp(x), if x < -700.0 { 0.0 } else { x.exp() });
            assert!((actual - expected).abs() <= 2e-13 * expected, "exp({x}) = {actual} not {expected}");
        }
        assert!(exp(0.0) == 1.0 && exp(f64::NEG_INFINITY) == 0.0 && exp(f64::NAN).is_nan());
        assert!((exp(-0.5) - (-0.5_f64 - 1e-11).exp()).abs() > 2e-13 * exp(-0.5), "the check can fail");
    }
}
