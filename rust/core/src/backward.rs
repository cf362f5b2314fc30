//! Gradients of the projection, with the mask recomputed.
//!
//! With `g = grad_values`, `s` the dropout scale (1 without dropout) and `gs[n, k] = g[n, k] * s` rounded once:
//!
//! * `grad_hidden[n, h] = keep(n, h) * sum_k gs[n, k] * weight[k, h]`, `k` in rising order: a product, then fused
//!   multiply-adds; one rounding to the hidden dtype;
//! * `grad_weight[k, h]`: rows are cut into chunks of [`CHUNK`] = 128. A chunk's partial sum starts at +0 and takes its
//!   rows in rising order, `partial = fma(gs[n, k], keep(n, h) * hidden[n, h], partial)`. Chunk `c` is then added to slot
//!   `c % 8` in rising order, and the 8 slots are folded by halves ([`reduce::fold_halves`]);
//! * `grad_bias[k]`: [`reduce::sum`] of `g[.., k]`.
//!
//! Every column is independent and no order depends on threads or grids: run to run, CPU and CUDA, the bits are the same.
use crate::{Dropout, Element, Error, Executor, Head, Level, Result, Rows, reduce};

/// Rows whose weight gradients form one chain of additions.
pub const CHUNK: usize = 128;
/// Slots that chunks are dealt to, in turn.
pub const SLOTS: usize = 8;

/// Where gradients go; `None` is not computed. Everything is overwritten.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// `[N, H]`, contiguous.
    pub hidden: Option<&'a mut [T]>,
    /// `[K, H]`, contiguous.
    pub weight: Option<&'a mut [f32]>,
    /// `[K]`.
    pub bias: Option<&'a mut [f32]>,
}

/// Writes the gradients of `values` (`grad_values` is `[N, K]` row-major).
///
/// # Errors
/// [`Error::Length`] where a buffer does not fit the rows and the head.
pub fn backward<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
    gradients: Gradients<'_, T>,
    executor: &dyn Executor,
) -> Result<()> {
    backward_with(Level::best(), hidden, head, dropout, grad_values, gradients, executor)
}

/// [`backward`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`backward`].
pub fn backward_with<T: Element>(
    level: Level,
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
    gradients: Gradients<'_, T>,
    executor: &dyn Executor,
) -> Result<()> {
    let _ = (level, executor); // placeholder until the SIMD kernels land
    let (rows, columns, outputs) = (hidden.count(), hidden.columns(), head.outputs());
    let check = |what, expected, actual| if expected == actual { Ok(()) } else { Err(Error::Length { what, expected, actual }) };
    check("weight", columns, head.columns())?;
    check("grad_values", rows * outputs, grad_values.len())?;
    let scale = dropout.map_or(1.0, Dropout::scale);
    let keep = |n: usize, h: usize| dropout.is_none_or(|d| d.keep(n as u64, (h / 8) as u32)[h % 8]);
    if let Some(out) = gradients.hidden {
        check("grad_hidden", rows * columns, out.len())?;
        for n in 0..rows {
            for h in 0..columns {
                let mut sum = 0.0;
                for k in 0..outputs {
                    let (gs, w) = (grad_values[n * outputs + k] * scale, if keep(n, h) { head.weight(k)[h] } else { 0.0 });
                    sum = if k == 0 { gs * w } else { gs.mul_add(w, sum) };
                }
                out[n * columns + h] = T::from_f32(sum);
            }
        }
    }
    if let Some(out) = gradients.weight {
        check("grad_weight", outputs * columns, out.len())?;
        for k in 0..outputs {
            for h in 0..columns {
                let mut slots = [0.0_f32; SLOTS];
                for chunk in 0..rows.div_ceil(CHUNK) {
                    let mut partial = 0.0_f32;
                    for n in chunk * CHUNK..rows.min((chunk + 1) * CHUNK) {
                        // SAFETY: `h` is below the row's length.
                        let x = unsafe { hidden.row(n).add(h).read_unaligned() }.to_f32();
                        let gs = if keep(n, h) { grad_values[n * outputs + k] * scale } else { 0.0 };
                        partial = gs.mul_add(x, partial);
                    }
                    slots[chunk % SLOTS] += partial;
                }
                out[k * columns + h] = reduce::fold_halves(&mut slots);
            }
        }
    }
    if let Some(out) = gradients.bias {
        check("grad_bias", outputs, out.len())?;
        for (k, out) in out.iter_mut().enumerate() {
            *out = reduce::sum((0..rows).map(|n| grad_values[n * outputs + k]));
        }
    }
    Ok(())
}
