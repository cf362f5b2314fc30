//! Values of rows: the kernel of [`crate::value_head`].
use super::keep::{self, Keep};
use super::{Kernel, Simd, WIDTH};
use crate::buffer::Buffer;
use crate::reduce::{self, LANES, OCTETS};
use crate::{Element, Head, Result, Rows, allocation};

/// Writes the values of the rows from `first` on, as many as `values` holds.
pub(crate) struct ValueHead<'a, T> {
    pub(crate) hidden: &'a Rows<'a, T>,
    pub(crate) head: &'a Head<'a>,
    pub(crate) weights: &'a Weights,
    pub(crate) keep: Option<&'a Keep>,
    pub(crate) scale: f32,
    pub(crate) first: usize,
    /// [`Weights::bits`].
    pub(crate) bits: &'a mut [u16],
    pub(crate) values: &'a mut [f32],
}

/// The weights of each output, followed by zeros up to whole tiles of [`LANES`] columns.
pub(crate) struct Weights {
    data: Buffer,
    stride: usize,
}

impl Weights {
    pub(crate) fn new(head: &Head<'_>) -> Result<Self> {
        let (columns, stride) = (head.columns(), head.columns().next_multiple_of(LANES));
        let mut data = Buffer::new(head.outputs() * stride)?;
        for (output, padded) in data.chunks_exact_mut(stride).enumerate() {
            padded[..columns].copy_from_slice(head.weight(output));
        }
        Ok(Self { data, stride })
    }

    /// Padded weights of an output: how far apart two outputs are.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Room for the mask of a row, up to whole tiles; none where every column is kept.
    pub(crate) fn bits(&self, keep: Option<&Keep>) -> Result<Vec<u16>> {
        allocation::filled(u16::MAX, keep.map_or(0, |_| self.stride / WIDTH))
    }

    /// The padded weights of an output.
    pub(crate) fn output(&self, output: usize) -> &[f32] {
        &self.data[output * self.stride..][..self.stride]
    }
}

impl<T: Element> Kernel for ValueHead<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        match self.keep {
            None => self.run_rows::<S, GROUPS, false>(simd),
            Some(_) => self.run_rows::<S, GROUPS, true>(simd),
        }
    }

    fn run_scalar(self) {
        let (columns, outputs) = (self.hidden.columns(), self.head.outputs());
        for (i, values) in self.values.chunks_exact_mut(outputs).enumerate() {
            let row = self.first + i;
            if let Some(keep) = self.keep {
                keep.fill_scalar(row as u64, 0, &mut self.bits[..keep::words(columns)]);
            }
            for (output, value) in values.iter_mut().enumerate() {
                let mut lanes = [0.0_f32; LANES];
                for (h, weight) in self.head.weight(output).iter().enumerate() {
                    let kept = self.keep.is_none() || self.bits[h / WIDTH] >> (h % WIDTH) & 1 == 1;
                    let lane = &mut lanes[h % LANES];
                    *lane = self.hidden.get(row, h).to_f32().mul_add(if kept { *weight } else { 0.0 }, *lane);
                }
                *value = reduce::finish(reduce::fold(&lanes), self.scale, self.head.bias(output));
            }
        }
    }
}

impl<T: Element> ValueHead<'_, T> {
    #[inline(always)]
    fn run_rows<S: Simd, const GROUPS: usize, const DROP: bool>(self, simd: S) {
        let columns = self.hidden.columns();
        let drawn = self.bits.len().min(keep::words(columns));
        let mut tail = [T::from_f32(0.0); LANES];
        for (i, values) in self.values.chunks_exact_mut(self.head.outputs()).enumerate() {
            let row = self.hidden.row(self.first + i);
            if let (true, Some(keep)) = (DROP, self.keep) {
                keep.fill(simd, (self.first + i) as u64, 0, &mut self.bits[..drawn], row.cast(), size_of::<T>());
            }
            self.hidden.read_part(self.first + i, columns - columns % LANES, &mut tail[..columns % LANES]);
            for (output, value) in values.iter_mut().enumerate() {
                let tiles = Tiles { row, full: columns / LANES, tail: tail.as_ptr(), count: columns.div_ceil(LANES) };
                let weights = self.weights.output(output).as_ptr();
                // SAFETY: the row has `full` tiles and `tail` is one; weights and bits are padded to whole tiles.
                let sum = unsafe { tiles.project::<S, GROUPS, DROP>(simd, weights, self.bits.as_ptr()) };
                *value = reduce::finish(sum, self.scale, self.head.bias(output));
            }
        }
    }
}

/// A row in tiles of [`LANES`] columns; the last, when it is not whole, is a zero-padded copy.
struct Tiles<T> {
    row: *const T,
    full: usize,
    tail: *const T,
    count: usize,
}

impl<T: Element> Tiles<T> {
    /// The three steps of [`crate::reduce`], in passes of as many lanes as the registers hold.
    ///
    /// # Safety
    /// `row` is valid for `full` tiles and `tail` for one, `weights` for `count` tiles, and with `DROP` so is `bits`.
    #[inline(always)]
    unsafe fn project<S: Simd, const GROUPS: usize, const DROP: bool>(
        &self,
        simd: S,
        weights: *const f32,
        bits: *const u16,
    ) -> f32 {
        let mut octets = [0.0; OCTETS];
        for first in (0..LANES / WIDTH).step_by(GROUPS) {
            let mut lanes = [simd.splat(0.0); GROUPS];
            for tile in 0..self.count {
                // SAFETY: tile and groups lie inside what the caller promises.
                unsafe {
                    let hidden = if tile < self.full { self.row.add(tile * LANES) } else { self.tail };
                    for (group, lane) in lanes.iter_mut().enumerate() {
                        let start = (first + group) * WIDTH;
                        let mut weight = simd.load_f32(weights.add(tile * LANES + start));
                        if DROP {
                            weight = simd.keep(weight, *bits.add(tile * (LANES / WIDTH) + first + group));
                        }
                        let hidden = T::load(simd, hidden.add(start));
                        *lane = simd.multiply_add(hidden, weight, *lane);
                    }
                }
            }
            // SAFETY: this pass owns `GROUPS * 2` octets from `first * 2` on.
            unsafe { simd.fold_octets(&lanes, octets.as_mut_ptr().add(first * 2)) };
        }
        reduce::fold_halves(&mut octets)
    }
}
