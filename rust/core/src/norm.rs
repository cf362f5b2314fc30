//! Root-mean-square norms as transformers' models compute them: in float32, rounded before the weight and after it.
use crate::simd::norm::RmsNorm;
use crate::threads::for_each_chunk;
use crate::{Element, Error, Executor, Level, Result, Rows};

/// Rows that a task takes.
const TASK_ROWS: usize = 16;

/// Writes `weight * x / sqrt(mean(x^2) + epsilon)` of rows `[N, H]` to `to`, `[N, H]`; the weight is `[H]`.
///
/// The mean is added in the order of [`crate::reduce`]; what the weight multiplies is rounded to the rows' dtype.
///
/// # Errors
/// [`Error::Length`] where sizes do not fit.
pub fn rms_norm<T: Element>(
    x: &Rows<'_, T>,
    weight: &[f32],
    epsilon: f32,
    to: &mut [T],
    executor: &dyn Executor,
) -> Result<()> {
    let columns = x.columns();
    for (what, expected, actual) in [("weight", columns, weight.len()), ("out", x.count() * columns, to.len())] {
        if expected != actual {
            return Err(Error::Length { what, expected, actual });
        }
    }
    for_each_chunk(executor, to, (TASK_ROWS * columns).max(1), |task, to| {
        Level::best().run(RmsNorm { x, weight, epsilon, first: task * TASK_ROWS, to });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Serial;
    use half::{bf16, f16};

    fn noise(i: usize) -> f32 {
        (i as f32 * 12.9898).sin() * 3.0
    }

    /// The norm in float64, rounded where the kernel rounds.
    fn plain<T: Element>(x: &[T], weight: &[f32], epsilon: f32) -> Vec<T> {
        let squares = x.iter().map(|x| f64::from(x.to_f32()).powi(2)).fold(0.0, |a, b| a + b);
        let scale = 1.0 / (squares / x.len() as f64 + f64::from(epsilon)).sqrt();
        let rounded = x.iter().map(|x| T::from_f32((f64::from(x.to_f32()) * scale) as f32));
        rounded.zip(weight).map(|(x, weight)| T::from_f32(x.to_f32() * weight)).collect()
    }

    fn check<T: Element>(columns: usize, tolerance: f32) -> Result<()> {
        let x: Vec<T> = (0..37 * columns).map(|i| T::from_f32(noise(i))).collect();
        let weight: Vec<f32> = (0..columns).map(|i| T::from_f32(noise(i + 7)).to_f32()).collect();
        let mut found = vec![T::from_f32(0.0); x.len()];
        let rows = Rows::contiguous(&x, 37, columns)?;
        rms_norm(&rows, &weight, 1e-3, &mut found, &Serial)?;
        let mut levels = Level::available();
        levels.push(Level::Scalar);
        for level in levels {
            let mut other = vec![T::from_f32(0.0); x.len()];
            level.run(RmsNorm { x: &rows, weight: &weight, epsilon: 1e-3, first: 0, to: &mut other });
            assert!(found.iter().zip(&other).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits()));
        }
        let mut differs = false;
        for (row, found) in x.chunks(columns).zip(found.chunks(columns)) {
            for (found, exact) in found.iter().zip(plain(row, &weight, 1e-3)) {
                assert!((found.to_f32() - exact.to_f32()).abs() <= tolerance * exact.to_f32().abs() + 1e-6);
            }
            let other_epsilon = plain(row, &weight, 3.0);
            let differ = |(a, b): (&T, T)| (a.to_f32() - b.to_f32()).abs() > 0.02 * b.to_f32().abs();
            differs |= found.iter().zip(other_epsilon).any(differ);
        }
        assert!(differs, "the check can fail");
        Ok(())
    }

    #[test]
    fn norms_are_those_of_float64_on_every_level() -> Result<()> {
        for columns in [1, 15, 16, 80, 257, 896] {
            check::<f32>(columns, 1e-6)?;
            // One rounding in another direction.
            check::<bf16>(columns, 1.0 / 128.0)?;
            check::<f16>(columns, 1.0 / 1024.0)?;
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() -> Result<()> {
        let rows = Rows::contiguous(&[1.0_f32; 6], 2, 3)?;
        assert!(rms_norm(&rows, &[1.0; 4], 1e-6, &mut [0.0; 6], &Serial).is_err());
        assert!(rms_norm(&rows, &[1.0; 3], 1e-6, &mut [0.0; 5], &Serial).is_err());
        Ok(())
    }
}
