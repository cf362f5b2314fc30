//! Gradients of one tile of hidden states: the kernel of [`crate::value_head_backward`].
use super::keep::{self, Keep};
use super::value_head::Weights;
use super::{Kernel, Simd, WIDTH};
use crate::{Element, Rows};
use std::ops::Range;

/// Most columns of a tile: its partial sums and weights stay in the first-level cache.
pub(crate) const BLOCK: usize = 2048;

/// Gradients of `rows` x `columns`; `columns` starts at a multiple of [`BLOCK`] and is at most that wide.
pub(crate) struct ValueHeadBackward<'a, T> {
    pub(crate) hidden: &'a Rows<'a, T>,
    pub(crate) weights: &'a Weights,
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

impl<T: Element> Kernel for ValueHeadBackward<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(mut self, simd: S) {
        if let Some(sums) = &mut self.grad_weight {
            sums.fill(0.0);
        }
        match (self.keep.is_some(), self.grad_weight.is_some(), self.grad_hidden.is_some()) {
            (_, false, false) => {}
            (false, false, true) => self.run_rows::<S, false, false, true>(simd),
            (false, true, false) => self.run_rows::<S, false, true, false>(simd),
            (false, true, true) => self.run_rows::<S, false, true, true>(simd),
            (true, false, true) => self.run_rows::<S, true, false, true>(simd),
            (true, true, false) => self.run_rows::<S, true, true, false>(simd),
            (true, true, true) => self.run_rows::<S, true, true, true>(simd),
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
                keep.fill_scalar(row as u64, self.columns.start / keep::COLUMNS, &mut bits[..stride / WIDTH]);
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

impl<T: Element> ValueHeadBackward<'_, T> {
    #[inline(always)]
    fn run_rows<S: Simd, const DROP: bool, const WEIGHT: bool, const HIDDEN: bool>(mut self, simd: S) {
        let pairs = self.rows.len() / 2 * 2;
        for row in (self.rows.start..self.rows.start + pairs).step_by(2) {
            self.run_lines::<S, 2, DROP, WEIGHT, HIDDEN>(simd, row);
        }
        if pairs < self.rows.len() {
            self.run_lines::<S, 1, DROP, WEIGHT, HIDDEN>(simd, self.rows.end - 1);
        }
    }

    /// `ROWS` rows at once share the loads of weights and sums; a sum takes them in rising order.
    #[inline(always)]
    fn run_lines<S: Simd, const ROWS: usize, const DROP: bool, const WEIGHT: bool, const HIDDEN: bool>(
        &mut self,
        simd: S,
        row: usize,
    ) {
        let mut bits = [[u16::MAX; BLOCK / WIDTH]; ROWS];
        let (start, width) = (self.columns.start, self.columns.len());
        let mut lines = self.lines::<ROWS>(row);
        for (i, bits) in bits.iter_mut().enumerate() {
            if let (true, Some(keep)) = (DROP, self.keep) {
                let (drawn, ahead) = (&mut bits[..keep::words(width)], lines.from[i].cast());
                keep.fill(simd, (row + i) as u64, start / keep::COLUMNS, drawn, ahead, size_of::<T>());
            }
        }
        let mut first = [simd.splat(0.0); ROWS];
        for (i, first) in first.iter_mut().enumerate() {
            *first = simd.splat(self.scaled[(row + i) * self.outputs]);
        }
        for group in 0..width / WIDTH {
            // SAFETY: the group lies inside the tile.
            unsafe { lines.group::<S, DROP, WEIGHT, HIDDEN>(simd, group * WIDTH, masks(&bits, group), first) };
        }
        if width % WIDTH > 0 {
            let (mask, back) = (masks(&bits, width / WIDTH), width / WIDTH * WIDTH);
            let (mut hidden, mut gradient) = ([[T::from_f32(0.0); WIDTH]; ROWS], [[T::from_f32(0.0); WIDTH]; ROWS]);
            for (i, hidden) in hidden.iter_mut().enumerate() {
                self.hidden.read_part(row + i, start + back, &mut hidden[..width - back]);
            }
            let to = lines.redirect(back, &hidden, &mut gradient);
            // SAFETY: the copies hold one group; `to` is valid for the row's last columns.
            unsafe {
                lines.group::<S, DROP, WEIGHT, HIDDEN>(simd, back, mask, first);
                if HIDDEN {
                    for (to, gradient) in to.iter().zip(&gradient) {
                        to.add(back).copy_from_nonoverlapping(gradient.as_ptr(), width - back);
                    }
                }
            }
        }
    }

    /// Where the tile's rows from `row` on lie.
    #[inline(always)]
    fn lines<const ROWS: usize>(&mut self, row: usize) -> Lines<T, ROWS> {
        let (columns, start) = (self.hidden.columns(), self.columns.start);
        let mut lines = Lines {
            outputs: self.outputs,
            weights: self.weights.output(0)[start..].as_ptr(),
            weights_stride: self.weights.stride(),
            sums: self.grad_weight.as_mut().map_or(std::ptr::null_mut(), |sums| sums.as_mut_ptr()),
            sums_stride: self.columns.len().next_multiple_of(WIDTH),
            scaled: [std::ptr::null(); ROWS],
            from: [std::ptr::null(); ROWS],
            to: [std::ptr::null_mut(); ROWS],
        };
        for i in 0..ROWS {
            lines.scaled[i] = self.scaled[(row + i) * self.outputs..][..self.outputs].as_ptr();
            lines.from[i] = self.hidden.row(row + i).wrapping_add(start);
            lines.to[i] = self.grad_hidden.map_or(lines.to[i], |to| to.wrapping_add((row + i) * columns + start));
        }
        lines
    }
}

/// `ROWS` rows of a tile; all pointers are at the tile's first column.
struct Lines<T, const ROWS: usize> {
    outputs: usize,
    weights: *const f32,
    weights_stride: usize,
    sums: *mut f32,
    sums_stride: usize,
    scaled: [*const f32; ROWS],
    from: [*const T; ROWS],
    to: [*mut T; ROWS],
}

/// A group's mask in each row.
#[inline(always)]
fn masks<const ROWS: usize>(bits: &[[u16; BLOCK / WIDTH]; ROWS], group: usize) -> [u16; ROWS] {
    std::array::from_fn(|row| bits[row][group])
}

impl<T: Element, const ROWS: usize> Lines<T, ROWS> {
    /// Puts copies of one group in the place of the columns from `start` on, and tells where gradients should have gone.
    fn redirect(&mut self, start: usize, from: &[[T; WIDTH]; ROWS], to: &mut [[T; WIDTH]; ROWS]) -> [*mut T; ROWS] {
        self.from = std::array::from_fn(|row| from[row].as_ptr().wrapping_sub(start));
        std::mem::replace(&mut self.to, to.each_mut().map(|to| to.as_mut_ptr().wrapping_sub(start)))
    }

    /// Sixteen columns, from column `start` of the tile on; `first` is each row's first scaled gradient.
    ///
    /// # Safety
    /// The pointers that `WEIGHT` and `HIDDEN` ask for are valid at these columns, `scaled` for `outputs` numbers.
    #[inline(always)]
    unsafe fn group<S: Simd, const DROP: bool, const WEIGHT: bool, const HIDDEN: bool>(
        &self,
        simd: S,
        start: usize,
        bits: [u16; ROWS],
        first: [S::F32; ROWS],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            if WEIGHT {
                let sums = self.sums.add(start);
                let mut sum = simd.load_f32(sums);
                for i in 0..ROWS {
                    let x = T::load(simd, self.from[i].wrapping_add(start));
                    sum = simd.multiply_add(kept::<S, DROP>(simd, first[i], bits[i]), x, sum);
                }
                simd.store_f32(sums, sum);
            }
            if HIDDEN && self.outputs == 1 {
                let weight = simd.load_f32(self.weights.add(start));
                for i in 0..ROWS {
                    let product = simd.multiply(first[i], kept::<S, DROP>(simd, weight, bits[i]));
                    T::store(simd, self.to[i].wrapping_add(start), product);
                }
            }
            if self.outputs > 1 {
                self.group_of_more::<S, DROP, WEIGHT, HIDDEN>(simd, start, bits);
            }
        }
    }

    /// What [`Lines::group`] has left to do where there is more than one output.
    ///
    /// # Safety
    /// As [`Lines::group`].
    #[inline(always)]
    unsafe fn group_of_more<S: Simd, const DROP: bool, const WEIGHT: bool, const HIDDEN: bool>(
        &self,
        simd: S,
        start: usize,
        bits: [u16; ROWS],
    ) {
        for (i, &bits) in bits.iter().enumerate() {
            // SAFETY: as the caller promises.
            unsafe {
                let x = if WEIGHT { T::load(simd, self.from[i].wrapping_add(start)) } else { simd.splat(0.0) };
                let mut product = simd.splat(0.0);
                for k in 0..self.outputs {
                    let scaled = simd.splat(*self.scaled[i].add(k));
                    let weight = simd.load_f32(self.weights.add(k * self.weights_stride + start));
                    let weight = kept::<S, DROP>(simd, weight, bits);
                    product =
                        if k == 0 { simd.multiply(scaled, weight) } else { simd.multiply_add(scaled, weight, product) };
                    if WEIGHT && k > 0 {
                        let sums = self.sums.add(k * self.sums_stride + start);
                        let scaled = kept::<S, DROP>(simd, scaled, bits);
                        simd.store_f32(sums, simd.multiply_add(scaled, x, simd.load_f32(sums)));
                    }
                }
                if HIDDEN {
                    T::store(simd, self.to[i].wrapping_add(start), product);
                }
            }
        }
    }
}

/// `numbers` where the mask keeps them, +0 elsewhere.
#[inline(always)]
fn kept<S: Simd, const DROP: bool>(simd: S, numbers: S::F32, bits: u16) -> S::F32 {
    if DROP { simd.keep(numbers, bits) } else { numbers }
}
