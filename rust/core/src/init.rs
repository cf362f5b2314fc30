//! Fresh weights from a seed: a function of (seed, index), the same on every machine and device.
//!
//! Only `+ - * / sqrt` in float64 and one rounding to float32 are used, so that any IEEE machine, a GPU included (with
//! contraction to fused multiply-adds turned off), gives the same bits; libm's logarithm and cosine would not.
//!
//! Element `i` reads word `i % 4` of the Philox block `i / 4` of its [`Stream`]; a normal number takes two words, so that
//! elements `2 j` and `2 j + 1` are the cosine and the sine of one Box-Muller pair. Logarithm and sine are truncated series
//! (see `ln`, `sin_cos`), within 4e-16 relative of the exact functions: far below float32's 6e-8.
use crate::math::ln;
use crate::philox::{Stream, philox4x32_10};
use crate::{Error, Result};
use std::f64::consts::FRAC_PI_2;

/// torch's default for `nn.Linear(columns, _)`, weight and bias alike: uniform in `[-1/sqrt(columns), 1/sqrt(columns)]`.
///
/// (Kaiming uniform with `a = sqrt(5)`, whose bound comes down to this one.)
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "one rounding to float32 is the promise"
)]
pub fn linear_default(parameter: &mut [f32], columns: usize, stream: Stream, seed: u64) {
    let bound = 1.0 / (columns.max(1) as f64).sqrt();
    for_each_block(parameter, stream, seed, |words| words.map(|word| ((2.0 * unit(word) - 1.0) * bound) as f32));
}

/// N(0, `std`^2), by the method of Box and Muller (1958).
///
/// # Errors
/// [`Error::StandardDeviation`] unless `std` is finite and not negative.
#[expect(clippy::cast_possible_truncation, reason = "one rounding to float32 is the promise")]
pub fn normal(parameter: &mut [f32], std: f32, stream: Stream, seed: u64) -> Result<()> {
    if !std.is_finite() || std < 0.0 {
        return Err(Error::StandardDeviation(std));
    }
    for_each_block(parameter, stream, seed, |[a, b, c, d]| {
        let ([z0, z1], [z2, z3]) = (normal_pair(a, b), normal_pair(c, d));
        [z0, z1, z2, z3].map(|z| (z * f64::from(std)) as f32)
    });
    Ok(())
}

/// Fills `parameter` with what `numbers` makes of the Philox blocks, in order.
#[expect(clippy::cast_possible_truncation, reason = "a block's number is two counter words")]
fn for_each_block(parameter: &mut [f32], stream: Stream, seed: u64, numbers: impl Fn([u32; 4]) -> [f32; 4]) {
    for (block, part) in parameter.chunks_mut(4).enumerate() {
        let block = block as u64;
        let words = philox4x32_10([block as u32, (block >> 32) as u32, 0, stream as u32], seed);
        part.copy_from_slice(&numbers(words)[..part.len()]);
    }
}

/// The middle of one of 2^32 equal parts of (0, 1): never 0, never 1.
fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) / 4_294_967_296.0
}

fn normal_pair(a: u32, b: u32) -> [f64; 2] {
    let radius = (-2.0 * ln(unit(a))).sqrt();
    let (sin, cos) = sin_cos(unit(b));
    [radius * cos, radius * sin]
}

/// Sine and cosine of `2 pi turn` for `turn` in `[0, 1]`.
///
/// The nearest quarter turn is taken off, exactly; for the rest, `|x| <= pi / 4`, Taylor's series stop at `x^17` and `x^16`:
/// what is left out is below 1e-19 and 3e-18.
fn sin_cos(turn: f64) -> (f64, f64) {
    let quarter = (4.0 * turn + 0.5).floor();
    let x = (4.0 * turn - quarter) * FRAC_PI_2;
    let series = |first: u32| {
        let terms = (0..8).rev().map(|k| f64::from((first + 2 * k + 1) * (first + 2 * k + 2)));
        terms.fold(1.0, |sum, divisor| 1.0 - x * x / divisor * sum)
    };
    let (sin, cos) = (x * series(1), series(0));
    match quarter as u8 % 4 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::TAU;

    fn close(actual: f64, expected: f64) -> bool {
        (actual - expected).abs() <= 1e-12 * expected.abs()
    }

    fn samples() -> impl Iterator<Item = u32> {
        let ends = [0, 1, 2, 1 << 29, 1 << 30, 1 << 31, 3 << 30, u32::MAX - 1, u32::MAX];
        ends.into_iter().chain((0..100_000).map(|i: u32| i.wrapping_mul(0x9E37_79B9)))
    }

    #[test]
    fn logarithm_is_that_of_std() {
        for word in samples() {
            let x = unit(word);
            assert!(close(ln(x), x.ln()), "ln({x}) = {} not {}", ln(x), x.ln());
        }
        assert!(!close(ln(0.3), 0.3_f64.ln() * (1.0 + 1e-11)));
    }

    #[test]
    fn sine_and_cosine_are_those_of_std() {
        for word in samples() {
            let turn = unit(word);
            // std's argument is rounded: compare on the first eighth of a turn, where that costs nothing.
            let (sin, cos) = sin_cos(turn / 8.0);
            assert!(close(sin, (turn / 8.0 * TAU).sin()) && close(cos, (turn / 8.0 * TAU).cos()), "{turn}");
            let (sin, cos) = sin_cos(turn);
            let (std_sin, std_cos) = (turn * TAU).sin_cos();
            assert!((sin - std_sin).abs() < 2e-15 && (cos - std_cos).abs() < 2e-15, "{turn}");
        }
    }
}
