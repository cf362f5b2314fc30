//! Fresh weights from a seed: a function of (seed, index), the same on every machine and device.
//!
//! Only `+ - * / sqrt` in float64 and one rounding to float32 are used, so that any IEEE machine, a GPU included, gives
//! the same bits; libm's logarithm and cosine would not.
use crate::philox::{Stream, philox4x32_10};

/// torch's default for `nn.Linear(columns, _)`: uniform in `[-1/sqrt(columns), 1/sqrt(columns))`.
pub fn linear_default(parameter: &mut [f32], columns: usize, stream: Stream, seed: u64) {
    let bound = 1.0 / (columns as f64).sqrt();
    for (i, p) in parameter.iter_mut().enumerate() {
        *p = ((f64::from(bits(i, stream, seed)) / 4_294_967_296.0 * 2.0 - 1.0) * bound) as f32;
    }
}

fn bits(index: usize, stream: Stream, seed: u64) -> u32 {
    let block = (index / 4) as u64;
    philox4x32_10([block as u32, (block >> 32) as u32, 0, stream as u32], seed)[index % 4]
}

/// N(0, `std`^2).
///
/// # Errors
/// [`crate::Error::StandardDeviation`] unless `std` is finite and not negative.
pub fn normal(parameter: &mut [f32], std: f32, stream: Stream, seed: u64) -> crate::Result<()> {
    let _ = (parameter, std, stream, seed);
    todo!("placeholder")
}
