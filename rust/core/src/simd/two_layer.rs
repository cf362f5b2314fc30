//! Many rows times many outputs, in the order of [`crate::reduce`]: the kernels of [`crate::two_layer`].
//!
//! One row and one output at a time, as [`super::value_head`] goes, every product costs two loads. Here a register holds the
//! same lane of 16 outputs, so that a load serves many products and the folds need no shuffles. Rows and weights are first
//! copied to *panels*: the numbers of a few rows (or outputs) side by side, columns in the order in which they are visited.
//!
//! The order visits lane after lane. A finished lane is added to the sums before it as a carry runs through a binary
//! counter, so that no more than one sum a level waits: the tree is the canonical one where the 32 octets come in
//! bit-reversed order, since halves fold octet `i` with octet `i + 16`.
use super::keep::{self, Keep};
use super::value_head::Weights;
use super::{Kernel, Level, Simd, WIDTH};
use crate::reduce::{LANES, OCTET, OCTETS};
use crate::threads::Shared;
use crate::{Element, Result, Rows, allocation};
use std::ops::Range;

/// Levels of the tree over [`LANES`] lanes.
const LEVELS: usize = LANES.trailing_zeros() as usize;
/// Outputs that tasks are cut by: a multiple of every [`Tile`]'s, and a divisor of [`LANES`].
pub(crate) const OUTPUTS: usize = 32;
/// Steps of a panel that are asked for ahead of their turn.
const AHEAD: usize = 12;
/// Added to a line's length, so that lines of a power of two do not share the cache's sets.
const SKEW: usize = 16;

/// Rows and outputs whose sums one pass holds in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
}

impl Tile {
    pub(crate) fn of(level: Level) -> Self {
        match level {
            Level::Avx512 => Self { rows: 12, outputs: 2 * WIDTH },
            _ => Self { rows: 6, outputs: WIDTH },
        }
    }
}

/// In which order columns are visited.
#[derive(Debug)]
pub(crate) struct Order {
    /// How many columns each lane has, in the order of visits.
    lengths: [usize; LANES],
    /// The columns, in the order of visits.
    columns: Vec<usize>,
}

impl Order {
    pub(crate) fn new(columns: usize) -> Result<Self> {
        let lanes: [usize; LANES] = std::array::from_fn(|visit| {
            let octet = (visit / OCTET).reverse_bits() >> (usize::BITS - OCTETS.trailing_zeros());
            octet * OCTET + visit % OCTET
        });
        let order = lanes.into_iter().flat_map(|lane| (lane..columns).step_by(LANES));
        Ok(Self {
            lengths: lanes.map(|lane| (lane..columns).step_by(LANES).len()),
            columns: allocation::collected(columns, order)?,
        })
    }
}

/// Rows that panels are made of.
pub(crate) struct Source<'a, T> {
    pub(crate) rows: &'a Rows<'a, T>,
    pub(crate) keep: Option<&'a Keep>,
    /// The mask's number of row 0.
    pub(crate) first_masked: u64,
}

impl<T: Element> Source<'_, T> {
    /// Copies row `row` to `line` as float32, a dropped element times zero; `bits` is room for its mask.
    #[inline(always)]
    fn read<S: Simd>(&self, simd: S, row: usize, bits: &mut [u16], line: &mut [f32]) {
        let (columns, from) = (self.rows.columns(), self.rows.row(row));
        if let Some(keep) = self.keep {
            keep.fill(simd, self.first_masked + row as u64, 0, bits, from.cast(), size_of::<T>());
        }
        let mut tail = [T::from_f32(0.0); WIDTH];
        let whole = columns / WIDTH * WIDTH;
        self.rows.read_part(row, whole, &mut tail[..columns - whole]);
        for (group, line) in line[..columns.next_multiple_of(WIDTH)].as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
            let start = group * WIDTH;
            // SAFETY: the group lies inside the row, or is the copy of its end.
            unsafe {
                let x = T::load(simd, if start < whole { from.add(start) } else { tail.as_ptr() });
                let x = if self.keep.is_some() { simd.multiply(x, simd.keep(simd.splat(1.0), bits[group])) } else { x };
                simd.store_f32(line.as_mut_ptr(), x);
            }
        }
    }

    /// [`Source::read`] in plain Rust.
    fn read_scalar(&self, row: usize, bits: &mut [u16], line: &mut [f32]) {
        if let Some(keep) = self.keep {
            keep.fill_scalar(self.first_masked + row as u64, 0, bits);
        }
        for (h, to) in line[..self.rows.columns()].iter_mut().enumerate() {
            let kept = self.keep.is_none() || bits[h / WIDTH] >> (h % WIDTH) & 1 == 1;
            *to = self.rows.get(row, h).to_f32() * if kept { 1.0 } else { 0.0 };
        }
    }

    /// Room for the mask of a row.
    pub(crate) fn bits(&self) -> Result<Vec<u16>> {
        allocation::filled(u16::MAX, keep::words(self.rows.columns()))
    }
}

/// What can be packed to panels, whatever its dtype.
pub(crate) trait Pack: Sync {
    fn count(&self) -> usize;
    fn columns(&self) -> usize;
    /// Writes the panel of `width` rows from `first` on, zeros where there are none; `lines` is room for them
    /// ([`room`]).
    fn pack(
        &self,
        level: Level,
        order: &Order,
        first: usize,
        width: usize,
        lines: &mut [f32],
        panel: &mut [f32],
    ) -> Result<()>;
}

/// Numbers that [`Pack::pack`] needs room for.
pub(crate) fn room(columns: usize, width: usize) -> usize {
    (columns.next_multiple_of(WIDTH) + SKEW) * width
}

impl<T: Element> Pack for Source<'_, T> {
    fn count(&self) -> usize {
        self.rows.count()
    }

    fn columns(&self) -> usize {
        self.rows.columns()
    }

    fn pack(
        &self,
        level: Level,
        order: &Order,
        first: usize,
        width: usize,
        lines: &mut [f32],
        panel: &mut [f32],
    ) -> Result<()> {
        let mut bits = self.bits()?;
        let stride = lines.len() / width;
        let count = width.min(self.rows.count().saturating_sub(first));
        lines[count * stride..].fill(0.0);
        level.run(Read { source: self, first, stride, bits: &mut bits, lines: &mut lines[..count * stride] });
        assert!(width * stride <= lines.len() && order.columns.len() <= stride);
        for (&column, numbers) in order.columns.iter().zip(panel.chunks_exact_mut(width)) {
            for (i, number) in numbers.iter_mut().enumerate() {
                // SAFETY: `order` holds the columns below its own length, which is no more than a line's.
                *number = unsafe { *lines.get_unchecked(i * stride + column) };
            }
        }
        Ok(())
    }
}

/// Copies the rows from `first` on to lines of `stride` numbers.
pub(crate) struct Read<'a, T> {
    pub(crate) source: &'a Source<'a, T>,
    pub(crate) first: usize,
    pub(crate) stride: usize,
    pub(crate) bits: &'a mut [u16],
    pub(crate) lines: &'a mut [f32],
}

impl<T: Element> Kernel for Read<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        for (i, line) in self.lines.chunks_exact_mut(self.stride).enumerate() {
            self.source.read(simd, self.first + i, self.bits, line);
        }
    }

    fn run_scalar(self) {
        for (i, line) in self.lines.chunks_exact_mut(self.stride).enumerate() {
            self.source.read_scalar(self.first + i, self.bits, line);
        }
    }
}

/// Where sums go.
pub(crate) trait Sink: Sync {
    /// The sums of rows `row..row + R` and outputs `output..output + V * 16`.
    ///
    /// Implementations are `#[inline(always)]`.
    fn take<S: Simd, const R: usize, const V: usize>(&self, simd: S, row: usize, output: usize, sums: [[S::F32; V]; R]);
    /// The sum of one row and one output.
    fn take_scalar(&self, row: usize, output: usize, sum: f32);
}

/// Multiplies the row panels `panels` with some weight panels.
pub(crate) struct Multiply<'a, K> {
    pub(crate) order: &'a Order,
    /// All row panels, one after the other.
    pub(crate) rows: &'a [f32],
    pub(crate) panels: Range<usize>,
    /// Weight panels, one after the other, and the first output in each.
    pub(crate) weights: &'a [f32],
    pub(crate) outputs: &'a [usize],
    pub(crate) sink: &'a K,
}

impl<K: Sink> Kernel for Multiply<'_, K> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        if GROUPS == 16 {
            self.run_tiles::<S, 12, 2>(simd);
        } else {
            self.run_tiles::<S, 6, 1>(simd);
        }
    }

    fn run_scalar(self) {
        let (tile, columns) = (Tile::of(Level::Scalar), self.order.columns.len());
        let weights = self.weights.chunks_exact(columns * tile.outputs).zip(self.outputs);
        for (panel, (weights, first)) in self.panels.clone().flat_map(|panel| weights.clone().map(move |w| (panel, w)))
        {
            let rows = &self.rows[panel * columns * tile.rows..][..columns * tile.rows];
            for (row, output) in (0..tile.rows).flat_map(|row| (0..tile.outputs).map(move |output| (row, output))) {
                let mut pairs = rows.chunks_exact(tile.rows).zip(weights.chunks_exact(tile.outputs));
                let (mut waiting, mut sum) = ([0.0; LEVELS], 0.0);
                for (visit, length) in self.order.lengths.iter().enumerate() {
                    let lane = pairs.by_ref().take(*length);
                    sum = lane.fold(0.0_f32, |lane, (x, w)| x[row].mul_add(w[output], lane));
                    let carried = visit.trailing_ones() as usize;
                    sum = waiting[..carried].iter().fold(sum, |sum, before| before + sum);
                    if carried < LEVELS {
                        waiting[carried] = sum;
                    }
                }
                self.sink.take_scalar(panel * tile.rows + row, first + output, sum);
            }
        }
    }
}

impl<K: Sink> Multiply<'_, K> {
    #[inline(always)]
    fn run_tiles<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let columns = self.order.columns.len();
        let width = columns * V * WIDTH;
        assert!(self.weights.len() >= self.outputs.len() * width && self.rows.len() >= self.panels.end * columns * R);
        for panel in self.panels.clone() {
            for (i, &output) in self.outputs.iter().enumerate() {
                // SAFETY: this weight panel is whole, and so is this row panel.
                let sums = unsafe {
                    let (rows, weights) = (self.rows.as_ptr().add(panel * columns * R), self.weights.as_ptr());
                    sums::<S, R, V>(simd, self.order, rows, weights.add(i * width))
                };
                self.sink.take(simd, panel * R, output, sums);
            }
        }
    }
}

/// The sums of `R` rows and `V * 16` outputs.
///
/// # Safety
/// `rows` and `weights` are panels of all columns of `order`.
#[inline(always)]
unsafe fn sums<S: Simd, const R: usize, const V: usize>(
    simd: S,
    order: &Order,
    mut rows: *const f32,
    mut weights: *const f32,
) -> [[S::F32; V]; R] {
    let mut waiting = [[[simd.splat(0.0); V]; R]; LEVELS + 1];
    for (visit, &length) in order.lengths.iter().enumerate() {
        let mut sums = [[simd.splat(0.0); V]; R];
        for _ in 0..length {
            // SAFETY: the panels have a column left for each step.
            unsafe {
                let weight: [S::F32; V] = std::array::from_fn(|v| simd.load_f32(weights.add(v * WIDTH)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = simd.splat(*rows.add(r));
                    for v in 0..V {
                        sums[v] = simd.multiply_add(x, weight[v], sums[v]);
                    }
                }
                simd.prefetch(weights.wrapping_add(AHEAD * V * WIDTH).cast());
                if V > 1 {
                    simd.prefetch(weights.wrapping_add(AHEAD * V * WIDTH + WIDTH).cast());
                }
                simd.prefetch(rows.wrapping_add(AHEAD * R).cast());
                (rows, weights) = (rows.add(R), weights.add(V * WIDTH));
            }
        }
        let carried = visit.trailing_ones() as usize;
        for before in &waiting[..carried] {
            for (sums, before) in sums.iter_mut().zip(before) {
                for v in 0..V {
                    sums[v] = simd.add(before[v], sums[v]);
                }
            }
        }
        waiting[carried] = sums;
    }
    waiting[LEVELS]
}

/// Adds the bias and keeps what is positive, or all.
#[inline(always)]
pub(crate) fn activate<S: Simd>(simd: S, sum: S::F32, scale: f32, bias: S::F32, relu: bool) -> S::F32 {
    let value = simd.multiply_add(sum, simd.splat(scale), bias);
    if relu { simd.maximum(simd.splat(0.0), value) } else { value }
}

/// [`activate`] in plain Rust.
pub(crate) fn activate_scalar(sum: f32, scale: f32, bias: f32, relu: bool) -> f32 {
    let value = sum.mul_add(scale, bias);
    if relu && 0.0 > value { 0.0 } else { value }
}

/// A matrix that sums are stored to: `[rows, outputs]`, contiguous.
pub(crate) struct Store<'a> {
    pub(crate) to: Shared<'a, f32>,
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    pub(crate) scale: f32,
    /// One number an output and zeros up to whole tiles.
    pub(crate) bias: &'a [f32],
    pub(crate) relu: bool,
}

impl Sink for Store<'_> {
    #[inline(always)]
    fn take<S: Simd, const R: usize, const V: usize>(
        &self,
        simd: S,
        row: usize,
        output: usize,
        sums: [[S::F32; V]; R],
    ) {
        for (i, sums) in sums.iter().enumerate().take(self.rows.saturating_sub(row)) {
            for (v, &sum) in sums.iter().enumerate() {
                let output = output + v * WIDTH;
                let count = WIDTH.min(self.outputs.saturating_sub(output));
                // SAFETY: the bias has whole tiles, and this tile of the matrix is nobody else's.
                unsafe {
                    let bias = simd.load_f32(self.bias[output..][..WIDTH].as_ptr());
                    let value = activate(simd, sum, self.scale, bias, self.relu);
                    let to = self.to.slice((row + i) * self.outputs + output.min(self.outputs), count);
                    if count == WIDTH {
                        simd.store_f32(to.as_mut_ptr(), value);
                    } else {
                        let mut numbers = [0.0; WIDTH];
                        simd.store_f32(numbers.as_mut_ptr(), value);
                        to.copy_from_slice(&numbers[..count]);
                    }
                }
            }
        }
    }

    fn take_scalar(&self, row: usize, output: usize, sum: f32) {
        if row < self.rows && output < self.outputs {
            // SAFETY: this element of the matrix is nobody else's.
            let to = unsafe { self.to.slice(row * self.outputs + output, 1) };
            to[0] = activate_scalar(sum, self.scale, self.bias[output], self.relu);
        }
    }
}

/// The lanes of a second layer, which sums are activated and multiplied into.
pub(crate) struct Second<'a> {
    /// `[rows, K, LANES]`; rows up to whole tiles.
    pub(crate) lanes: Shared<'a, f32>,
    /// `[K, stride]`, with zeros up to whole tiles.
    pub(crate) weights: &'a Weights,
    pub(crate) outputs: usize,
    /// Width of the first layer.
    pub(crate) columns: usize,
    pub(crate) scale: f32,
    pub(crate) bias: &'a [f32],
}

impl Sink for Second<'_> {
    #[inline(always)]
    fn take<S: Simd, const R: usize, const V: usize>(
        &self,
        simd: S,
        row: usize,
        output: usize,
        sums: [[S::F32; V]; R],
    ) {
        for (v, column) in (0..V).map(|v| (v, output + v * WIDTH)) {
            // Sums past the layer's width are not zero where a hidden state is not finite.
            let bits = (u32::from(u16::MAX) >> WIDTH.saturating_sub(self.columns.saturating_sub(column))) as u16;
            // SAFETY: bias and weights have whole tiles.
            let bias = unsafe { simd.load_f32(self.bias[column..][..WIDTH].as_ptr()) };
            for (r, sums) in sums.iter().enumerate() {
                let x = simd.keep(activate(simd, sums[v], self.scale, bias, true), bits);
                for k in 0..self.outputs {
                    let lane = ((row + r) * self.outputs + k) * LANES + column % LANES;
                    // SAFETY: these lanes of the row are nobody else's; the weights have whole tiles.
                    unsafe {
                        let weight = simd.load_f32(self.weights.output(k)[column..][..WIDTH].as_ptr());
                        let lane = self.lanes.slice(lane, WIDTH).as_mut_ptr();
                        simd.store_f32(lane, simd.multiply_add(x, weight, simd.load_f32(lane)));
                    }
                }
            }
        }
    }

    fn take_scalar(&self, row: usize, output: usize, sum: f32) {
        if output < self.columns {
            let x = activate_scalar(sum, self.scale, self.bias[output], true);
            for k in 0..self.outputs {
                // SAFETY: this lane of the row is nobody else's.
                let lane = unsafe { self.lanes.slice((row * self.outputs + k) * LANES + output % LANES, 1) };
                lane[0] = x.mul_add(self.weights.output(k)[output], lane[0]);
            }
        }
    }
}
