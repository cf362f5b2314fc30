//! Gradients of one tile of hidden states: the backward kernel.
use super::keep::{self, Keep};
use super::project::Weights;
use super::{Kernel, Simd, WIDTH};
use crate::{Element, Rows};
use std::ops::Range;

/// Most columns of a tile: its partial sums and weights stay in the first-level cache.
pub(crate) const BLOCK: usize = 2048;

/// Gradients of `rows` x `columns`; `columns` starts at a multiple of [`BLOCK`] and is at most that wide.
pub(crate) struct Gradient<'a, T> {
    pub(crate) hidden: &'a Rows<'a, T>,
    pub(crate) weights: &'a Weights<'a>,
    pub(crate) outputs: usize,
    pub(crate) keep: Option<&'a Keep>,
    /// `grad_values * scale`, `[N, K]`.
    pub(crate) scaled: &'a [f32],
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    /// The whole `[N, H]`, of which this tile writes its part.
    pub(crate) grad_hidden: Option<*mut T>,
    /// Sums over `rows`: for each output as many numbers as the tile has columns, rounded up to a multiple of 16.
    pub(crate) grad_weight: Option<&'a mut [f32]>,
}

impl<T: Element> Kernel for Gradient<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(mut self, simd: S) {
        if let Some(sums) = &mut self.grad_weight {
            sums.fill(0.0);
        }
        match self.keep {
            None => self.run_rows::<S, false>(simd),
            Some(_) => self.run_rows::<S, true>(simd),
        }
    }

    fn run_scalar(mut self) {
        let mut bits = [u16::MAX; BLOCK / WIDTH];
        let stride = self.columns.len().next_multiple_of(WIDTH);
        if let Some(sums) = &mut self.grad_weight {
            sums.fill(0.0);
        }
        for row in self.rows.clone() {
            if let Some(keep) = self.keep {
                keep.fill_scalar(row as u64, self.columns.start / keep::COLUMNS, &mut bits);
            }
            let scaled = &self.scaled[row * self.outputs..][..self.outputs];
            for (i, h) in self.columns.clone().enumerate() {
                let kept = |x: f32| if bits[i / WIDTH] >> (i % WIDTH) & 1 == 1 { x } else { 0.0 };
                if let Some(sums) = &mut self.grad_weight {
                    let x = self.hidden.get(row, h).to_f32();
                    for (k, gs) in scaled.iter().enumerate() {
                        sums[k * stride + i] = kept(*gs).mul_add(x, sums[k * stride + i]);
                    }
                }
                if let Some(to) = self.grad_hidden {
                    let weight = |k: usize| kept(self.weights.output(k)[h]);
                    let rest = scaled.iter().enumerate().skip(1);
                    let sum = rest.fold(scaled[0] * weight(0), |sum, (k, gs)| gs.mul_add(weight(k), sum));
                    // SAFETY: `to` is `[N, H]`, and this tile alone writes its part.
                    unsafe { to.add(row * self.hidden.columns() + h).write(T::from_f32(sum)) };
                }
            }
        }
    }
}

impl<T: Element> Gradient<'_, T> {
    #[inline(always)]
    fn run_rows<S: Simd, const DROP: bool>(&mut self, simd: S) {
        let mut bits = [u16::MAX; BLOCK / WIDTH];
        let (whole, ragged) = (self.columns.len() / WIDTH, self.columns.len() % WIDTH);
        for row in self.rows.clone() {
            let from = self.hidden.row(row).wrapping_add(self.columns.start);
            if let (true, Some(keep)) = (DROP, self.keep) {
                let drawn = &mut bits[..keep::words(self.columns.len())];
                keep.fill(simd, row as u64, self.columns.start / keep::COLUMNS, drawn, from.cast(), size_of::<T>());
            }
            let offset = row * self.hidden.columns() + self.columns.start;
            let to = self.grad_hidden.map(|to| to.wrapping_add(offset));
            for (group, &bits) in bits[..whole].iter().enumerate() {
                // SAFETY: the group lies inside the tile.
                unsafe { self.group::<S, DROP>(simd, row, group, bits, from, to) };
            }
            if ragged > 0 {
                let (mut hidden, mut gradient) = ([T::from_f32(0.0); WIDTH], [T::from_f32(0.0); WIDTH]);
                self.hidden.read_tail(row, self.columns.start + whole * WIDTH, &mut hidden[..ragged]);
                let back = whole * WIDTH;
                let (from, copy) = (hidden.as_ptr().wrapping_sub(back), gradient.as_mut_ptr().wrapping_sub(back));
                // SAFETY: the copies hold one group; `to` is valid for the row's last `ragged` columns.
                unsafe {
                    self.group::<S, DROP>(simd, row, whole, bits[whole], from, to.map(|_| copy));
                    if let Some(to) = to {
                        to.add(back).copy_from_nonoverlapping(gradient.as_ptr(), ragged);
                    }
                }
            }
        }
    }

    /// Sixteen columns of one row; `from` and `to` point at the tile's first column.
    ///
    /// # Safety
    /// `from` and `to` are valid at the group's sixteen columns.
    #[inline(always)]
    unsafe fn group<S: Simd, const DROP: bool>(
        &mut self,
        simd: S,
        row: usize,
        group: usize,
        bits: u16,
        from: *const T,
        to: Option<*mut T>,
    ) {
        let start = group * WIDTH;
        let stride = self.columns.len().next_multiple_of(WIDTH);
        let keep = |x: S::F32| if DROP { simd.keep(x, bits) } else { x };
        // SAFETY: `scaled` is `[N, K]`, sums and weights are padded to whole groups; the rest is the caller's promise.
        unsafe {
            let scaled = self.scaled.as_ptr().add(row * self.outputs);
            if let Some(sums) = &mut self.grad_weight {
                let x = T::load(simd, from.wrapping_add(start));
                for k in 0..self.outputs {
                    let sum = sums.as_mut_ptr().add(k * stride + start);
                    let gs = keep(simd.splat(*scaled.add(k)));
                    simd.store_f32(sum, simd.multiply_add(gs, x, simd.load_f32(sum)));
                }
            }
            if let Some(to) = to {
                let weight =
                    |k: usize| keep(simd.load_f32(self.weights.output(k).as_ptr().add(self.columns.start + start)));
                let mut sum = simd.multiply(simd.splat(*scaled), weight(0));
                for k in 1..self.outputs {
                    sum = simd.multiply_add(simd.splat(*scaled.add(k)), weight(k), sum);
                }
                T::store(simd, to.wrapping_add(start), sum);
            }
        }
    }
}
