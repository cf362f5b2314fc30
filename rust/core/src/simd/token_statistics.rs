//! One pass over a tile of logits: the kernels of [`crate::token_statistics`].
use super::elementary::{LEAST, exp, exp_scalar, tanh, tanh_scalar};
use super::{Kernel, Simd, WIDTH};
use crate::row_state::{BLOCK, RowState};
use crate::threads::Shared;
use crate::{LogitsRule, Rows};
use std::ops::Range;

/// Products of hidden states and weights: some rows, and the columns from `first` on.
pub(crate) struct Tile<'a> {
    pub(crate) products: &'a Rows<'a, f32>,
    pub(crate) rule: &'a LogitsRule,
    /// The vocabulary's biases from column `first` on, where there are some.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) first: usize,
}

/// Sixteen products as logits over temperature.
#[inline(always)]
fn logits<S: Simd, const RULE: bool>(simd: S, rule: &LogitsRule, product: S::F32, bias: S::F32) -> S::F32 {
    if !RULE {
        return product;
    }
    let scaled = simd.multiply(simd.add(product, bias), simd.splat(rule.inner));
    match rule.outer {
        Some(outer) => simd.multiply(tanh(simd, scaled), simd.splat(outer)),
        None => scaled,
    }
}

/// [`logits`] in plain Rust.
fn logit(rule: &LogitsRule, product: f32, bias: f32) -> f32 {
    if rule.is_identity() && bias == 0.0 {
        return product;
    }
    let scaled = (product + bias) * rule.inner;
    rule.outer.map_or(scaled, |outer| tanh_scalar(scaled) * outer)
}

impl Tile<'_> {
    /// Whether logits are more than the products.
    fn has_rule(&self) -> bool {
        self.bias.is_some() || !self.rule.is_identity()
    }

    fn bias(&self, column: usize) -> f32 {
        self.bias.map_or(0.0, |bias| bias[column])
    }

    /// Sixteen products and biases of row `row` from column `column` on, of which `count` are there.
    ///
    /// # Safety
    /// The row has `column + count` columns.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, simd: S, row: usize, column: usize, count: usize) -> (S::F32, S::F32) {
        let (mut products, mut biases) = ([0.0; WIDTH], [0.0; WIDTH]);
        // SAFETY: as the caller promises.
        unsafe {
            let from = self.products.row(row).add(column);
            let bias = self.bias.map(|bias| &bias[column..][..count]);
            if count == WIDTH {
                return (simd.load_f32(from), bias.map_or(simd.splat(0.0), |bias| simd.load_f32(bias.as_ptr())));
            }
            products.as_mut_ptr().copy_from_nonoverlapping(from, count);
            if let Some(bias) = bias {
                biases[..count].copy_from_slice(bias);
            }
            (simd.load_f32(products.as_ptr()), simd.load_f32(biases.as_ptr()))
        }
    }
}

/// Adds a tile to its rows' statistics.
pub(crate) struct Fold<'a> {
    pub(crate) tile: &'a Tile<'a>,
    /// The tile's rows, and where the first of them keeps its statistics.
    pub(crate) rows: Range<usize>,
    pub(crate) states: &'a mut [RowState],
    /// Target of each state.
    pub(crate) targets: &'a [usize],
}

/// A block of one row: logits over temperature, -infinity where there is no column.
#[repr(C, align(64))]
struct Line([f32; BLOCK]);

impl Kernel for Fold<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        if self.tile.has_rule() { self.run_rows::<S, true>(simd) } else { self.run_rows::<S, false>(simd) }
    }

    fn run_scalar(self) {
        let (tile, mut line) = (self.tile, Line([0.0; BLOCK]));
        for ((row, state), target) in self.rows.clone().zip(self.states).zip(self.targets) {
            for start in (0..tile.products.columns()).step_by(BLOCK) {
                let count = BLOCK.min(tile.products.columns() - start);
                line.0.fill(f32::NEG_INFINITY);
                for (i, z) in line.0[..count].iter_mut().enumerate() {
                    *z = logit(tile.rule, tile.products.get(row, start + i), tile.bias(start + i));
                }
                let peak = largest(&line.0);
                let reference = state.meet(peak, &line.0[..count], tile.first + start, *target);
                let mut sums = [[0.0_f32; WIDTH]; 3];
                for group in line.0[..count.next_multiple_of(WIDTH)].as_chunks::<WIDTH>().0 {
                    for (lane, z) in group.iter().enumerate() {
                        let d = z - reference;
                        let clamped = if LEAST > d { LEAST } else { d };
                        let e = if d < LEAST { 0.0 } else { exp_scalar(clamped) };
                        sums[0][lane] += e;
                        sums[1][lane] = e.mul_add(clamped, sums[1][lane]);
                        sums[2][lane] = e.mul_add(e, sums[2][lane]);
                    }
                }
                state.add(&sums);
            }
        }
    }
}

/// The largest number; NaN is none.
fn largest(line: &[f32]) -> f32 {
    line.iter().fold(f32::NEG_INFINITY, |peak, z| if *z > peak { *z } else { peak })
}

impl Fold<'_> {
    #[inline(always)]
    fn run_rows<S: Simd, const RULE: bool>(self, simd: S) {
        let mut line = Line([0.0; BLOCK]);
        for ((row, state), target) in self.rows.clone().zip(self.states).zip(self.targets) {
            for start in (0..self.tile.products.columns()).step_by(BLOCK) {
                // SAFETY: the row has the columns from `start` on.
                let (count, peak) = unsafe { fill::<S, RULE>(simd, self.tile, row, start, &mut line.0) };
                let reference = state.meet(peak, &line.0[..count], self.tile.first + start, *target);
                state.add(&sums(simd, &line.0[..count.next_multiple_of(WIDTH)], reference));
            }
        }
    }
}

/// Writes a block's logits to `line`, -infinity up to a whole vector; how many they are, and their largest.
///
/// # Safety
/// `start` is a column of the tile.
#[inline(always)]
unsafe fn fill<S: Simd, const RULE: bool>(
    simd: S,
    tile: &Tile<'_>,
    row: usize,
    start: usize,
    line: &mut [f32; BLOCK],
) -> (usize, f32) {
    let count = BLOCK.min(tile.products.columns() - start);
    let mut peaks = [simd.splat(f32::NEG_INFINITY); 2];
    for group in 0..count / WIDTH {
        // SAFETY: a whole group of the block.
        unsafe {
            let (product, bias) = tile.load(simd, row, start + group * WIDTH, WIDTH);
            let z = logits::<S, RULE>(simd, tile.rule, product, bias);
            simd.store_f32(line.as_mut_ptr().add(group * WIDTH), z);
            peaks[group % 2] = simd.maximum(z, peaks[group % 2]);
        }
    }
    let (whole, mut lanes) = (count / WIDTH * WIDTH, [0.0; WIDTH]);
    if whole < count {
        // SAFETY: the rest of the block.
        unsafe {
            let (product, bias) = tile.load(simd, row, start + whole, count - whole);
            simd.store_f32(lanes.as_mut_ptr(), logits::<S, RULE>(simd, tile.rule, product, bias));
            lanes[count - whole..].fill(f32::NEG_INFINITY);
            line[whole..whole + WIDTH].copy_from_slice(&lanes);
            peaks[0] = simd.maximum(simd.load_f32(lanes.as_ptr()), peaks[0]);
        }
    }
    // SAFETY: 16 lanes.
    unsafe { simd.store_f32(lanes.as_mut_ptr(), simd.maximum(peaks[0], peaks[1])) };
    (count, largest(&lanes))
}

/// Sums of `e`, `e * d` and `e * e` in 16 lanes each, with `d = z - reference` and `e = exp(d)`.
#[inline(always)]
fn sums<S: Simd>(simd: S, line: &[f32], reference: f32) -> [[f32; WIDTH]; 3] {
    let (reference, least, zero) = (simd.splat(reference), simd.splat(LEAST), simd.splat(0.0));
    let (mut sum, mut weighted, mut squares) = (zero, zero, zero);
    for group in line.as_chunks::<WIDTH>().0 {
        // SAFETY: a group is 16 numbers.
        let d = simd.subtract(unsafe { simd.load_f32(group.as_ptr()) }, reference);
        let clamped = simd.maximum(least, d);
        let e = simd.choose_less(d, least, zero, exp(simd, clamped));
        sum = simd.add(sum, e);
        weighted = simd.multiply_add(e, clamped, weighted);
        squares = simd.multiply_add(e, e, squares);
    }
    let mut lanes = [[0.0; WIDTH]; 3];
    for (lanes, sums) in lanes.iter_mut().zip([sum, weighted, squares]) {
        // SAFETY: 16 lanes.
        unsafe { simd.store_f32(lanes.as_mut_ptr(), sums) };
    }
    lanes
}

/// What backward knows of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowGradient {
    pub(crate) target: usize,
    pub(crate) peak: f32,
    pub(crate) log_sum: f32,
    pub(crate) entropy: f32,
    pub(crate) grad_logprob: f32,
    pub(crate) grad_entropy: f32,
}

/// Turns the products of a tile into their gradients.
pub(crate) struct Differentiate<'a> {
    pub(crate) tile: &'a Tile<'a>,
    pub(crate) rows: Range<usize>,
    /// One a row of `rows`.
    pub(crate) states: &'a [RowGradient],
    /// `[rows of the tile, columns]`: may be the products' own memory.
    pub(crate) to: &'a Shared<'a, f32>,
    /// Numbers from a row of `to` to the next.
    pub(crate) stride: usize,
}

impl Kernel for Differentiate<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        if self.tile.has_rule() { self.run_rows::<S, true>(simd) } else { self.run_rows::<S, false>(simd) }
    }

    fn run_scalar(self) {
        let columns = self.tile.products.columns();
        for (row, state) in self.rows.clone().zip(self.states) {
            for column in 0..columns {
                let (product, bias) = (self.tile.products.get(row, column), self.tile.bias(column));
                let (z, slope) = (logit(self.tile.rule, product, bias), slope(self.tile.rule, product, bias));
                let logp = (z - state.peak) - state.log_sum;
                let clamped = if LEAST > logp { LEAST } else { logp };
                let p = if logp < LEAST { 0.0 } else { exp_scalar(clamped) };
                let pull = state.grad_entropy.mul_add(clamped + state.entropy, state.grad_logprob);
                let push = if self.tile.first + column == state.target { state.grad_logprob } else { 0.0 };
                // SAFETY: this row is nobody else's.
                let to = unsafe { self.to.slice(row * self.stride + column, 1) };
                to[0] = (push - p * pull) * slope;
            }
        }
    }
}

/// Derivative of a logit over temperature by its product.
fn slope(rule: &LogitsRule, product: f32, bias: f32) -> f32 {
    let Some(outer) = rule.outer else { return rule.inner };
    let t = tanh_scalar((product + bias) * rule.inner);
    (1.0 - t * t) * (rule.inner * outer)
}

impl Differentiate<'_> {
    #[inline(always)]
    fn run_rows<S: Simd, const RULE: bool>(self, simd: S) {
        let columns = self.tile.products.columns();
        for (row, state) in self.rows.clone().zip(self.states) {
            let target = state.target.wrapping_sub(self.tile.first);
            for column in (0..columns).step_by(WIDTH) {
                let count = WIDTH.min(columns - column);
                let push = if target.wrapping_sub(column) < count { Some(target - column) } else { None };
                // SAFETY: the row has these columns, and is nobody else's.
                unsafe {
                    let (product, bias) = self.tile.load(simd, row, column, count);
                    let gradient = gradient::<S, RULE>(simd, self.tile.rule, state, product, bias, push);
                    let to = self.to.slice(row * self.stride + column, count);
                    if count == WIDTH {
                        simd.store_f32(to.as_mut_ptr(), gradient);
                    } else {
                        let mut lanes = [0.0; WIDTH];
                        simd.store_f32(lanes.as_mut_ptr(), gradient);
                        to.copy_from_slice(&lanes[..count]);
                    }
                }
            }
        }
    }
}

/// Gradients of sixteen products; `push` is the target's place among them.
#[inline(always)]
fn gradient<S: Simd, const RULE: bool>(
    simd: S,
    rule: &LogitsRule,
    state: &RowGradient,
    product: S::F32,
    bias: S::F32,
    push: Option<usize>,
) -> S::F32 {
    let (least, zero, one) = (simd.splat(LEAST), simd.splat(0.0), simd.splat(1.0));
    let (z, slope) = match rule.outer {
        Some(outer) if RULE => {
            let t = tanh(simd, simd.multiply(simd.add(product, bias), simd.splat(rule.inner)));
            let slope = simd.multiply(simd.subtract(one, simd.multiply(t, t)), simd.splat(rule.inner * outer));
            (simd.multiply(t, simd.splat(outer)), slope)
        }
        _ => (logits::<S, RULE>(simd, rule, product, bias), simd.splat(rule.inner)),
    };
    let logp = simd.subtract(simd.subtract(z, simd.splat(state.peak)), simd.splat(state.log_sum));
    let clamped = simd.maximum(least, logp);
    let p = simd.choose_less(logp, least, zero, exp(simd, clamped));
    let surprise = simd.add(clamped, simd.splat(state.entropy));
    let pull = simd.multiply_add(simd.splat(state.grad_entropy), surprise, simd.splat(state.grad_logprob));
    let bits = push.map_or(0, |lane| 1 << lane);
    let push = simd.keep(simd.splat(state.grad_logprob), bits);
    simd.multiply(simd.subtract(push, simd.multiply(p, pull)), slope)
}
