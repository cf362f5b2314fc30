//! Gradients of the value head, with the mask computed again.
//!
//! With `g = grad_values`, `s` the dropout scale (1 without dropout) and `gs[n, k] = g[n, k] * s` rounded once:
//!
//! * `grad_hidden[n, h] = keep(n, h) * sum_k gs[n, k] * weight[k, h]`, `k` in rising order: a product, then fused
//!   multiply-adds; one rounding to the hidden dtype;
//! * `grad_weight[k, h]`: rows are cut into chunks of [`CHUNK`] = 128. A chunk's partial sum starts at +0 and takes its
//!   rows in rising order, `partial = fma(gs[n, k], keep(n, h) * hidden[n, h], partial)`. Chunk `c` is then added to slot
//!   `c % 8` in rising order, and the 8 slots are folded by halves ([`reduce::fold_halves`]);
//! * `grad_bias[k]`: [`reduce::sum`] of `g[.., k]`, in float64 and rounded once.
//!
//! Every column is independent and no order depends on threads or grids: run to run, CPU and CUDA, the bits are the same.
use crate::buffer::Buffer;
use crate::head::check;
use crate::simd::keep::Keep;
use crate::simd::value_head::Weights;
use crate::simd::value_head_backward::{BLOCK, ValueHeadBackward};
use crate::threads::{Shared, advise_huge_pages, for_each_chunk};
use crate::{Dropout, Element, Error, Executor, Head, Level, Result, Rows, allocation, reduce};
use std::ops::Range;

/// Rows whose weight gradients form one chain of additions.
pub const CHUNK: usize = 128;
/// Slots that chunks are dealt to, in turn.
pub const SLOTS: usize = 8;
/// Chunks whose partial sums are held at once: it bounds the memory of a call, and is a multiple of [`SLOTS`].
const WAVE: usize = 256;
/// Bytes of the gradient of the hidden states that one task writes, in a row. The system zeroes fresh memory a (huge, 2 MiB)
/// page at a time, on the first touch; two threads that touch the same page at once both zero it, and one has done so for
/// nothing. With several pages to a task they meet at a task's ends only.
const TASK_BYTES: usize = 4 << 20;

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
pub fn value_head_backward<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
    gradients: Gradients<'_, T>,
    executor: &dyn Executor,
) -> Result<()> {
    value_head_backward_with(Level::best(), hidden, head, dropout, grad_values, gradients, executor)
}

/// [`value_head_backward`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`value_head_backward`].
pub fn value_head_backward_with<T: Element>(
    level: Level,
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    grad_values: &[f32],
    gradients: Gradients<'_, T>,
    executor: &dyn Executor,
) -> Result<()> {
    let (rows, columns, outputs) = (hidden.count(), hidden.columns(), head.outputs());
    check(level, hidden, head.columns(), "grad_values", grad_values.len(), outputs)?;
    check_lengths(&gradients, rows, columns, outputs)?;
    let scale = dropout.map_or(1.0, Dropout::scale);
    let scaled = allocation::collected(grad_values.len(), grad_values.iter().map(|g| g * scale))?;
    let keep = dropout.map(|dropout| Keep::new(dropout, columns)).transpose()?;
    let Gradients { hidden: mut grad_hidden, weight: grad_weight, bias: grad_bias } = gradients;
    if let Some(to) = &mut grad_hidden {
        advise_huge_pages(to);
    }
    let tiles = Tiles {
        level,
        hidden,
        weights: Weights::new(head)?,
        outputs,
        keep,
        scaled,
        grad_hidden: grad_hidden.map(Shared::new),
    };
    match grad_weight {
        Some(to) => tiles.run_with_weight(to, executor)?,
        None if tiles.grad_hidden.is_some() => tiles.run(0..rows.div_ceil(CHUNK), None, executor),
        None => {}
    }
    if let Some(to) = grad_bias {
        for (k, to) in to.iter_mut().enumerate() {
            *to = reduce::sum((0..rows).map(|n| grad_values[n * outputs + k]));
        }
    }
    Ok(())
}

fn check_lengths<T>(gradients: &Gradients<'_, T>, rows: usize, columns: usize, outputs: usize) -> Result<()> {
    let lengths = [
        ("grad_hidden", gradients.hidden.as_ref().map(|to| to.len()), rows.saturating_mul(columns)),
        ("grad_weight", gradients.weight.as_ref().map(|to| to.len()), outputs * columns),
        ("grad_bias", gradients.bias.as_ref().map(|to| to.len()), outputs),
    ];
    match lengths.into_iter().find(|(_, actual, expected)| actual.is_some_and(|actual| actual != *expected)) {
        Some((what, Some(actual), expected)) => Err(Error::Length { what, expected, actual }),
        _ => Ok(()),
    }
}

/// The hidden states cut into tiles of one chunk of rows by one block of columns.
struct Tiles<'a, T> {
    level: Level,
    hidden: &'a Rows<'a, T>,
    weights: Weights,
    outputs: usize,
    keep: Option<Keep>,
    scaled: Vec<f32>,
    grad_hidden: Option<Shared<'a, T>>,
}

impl<T: Element> Tiles<'_, T> {
    /// Length of a tile's partial sums: those of a whole block.
    fn sums(&self) -> usize {
        self.outputs * BLOCK.min(self.hidden.columns().next_multiple_of(crate::simd::WIDTH))
    }

    /// Every tile of some chunks; partial sums go to `partials`, chunk by chunk and block by block.
    fn run(&self, chunks: Range<usize>, partials: Option<&mut [f32]>, executor: &dyn Executor) {
        let partials = partials.map(Shared::new);
        let tiles = chunks.len() * self.blocks();
        let group = self.tiles_in_task(tiles, executor);
        executor.run(tiles.div_ceil(group), &|task| {
            for tile in task * group..tiles.min((task + 1) * group) {
                self.run_tile(chunks.start, tile, partials.as_ref());
            }
        });
    }

    /// Consecutive tiles that one task takes: about [`TASK_BYTES`] of the gradient of the hidden states, but no thread goes
    /// without.
    fn tiles_in_task(&self, tiles: usize, executor: &dyn Executor) -> usize {
        let bytes = CHUNK * BLOCK.min(self.hidden.columns()) * size_of::<T>();
        let wanted = if self.grad_hidden.is_some() { TASK_BYTES / bytes } else { 1 };
        wanted.min(tiles.div_ceil(executor.threads())).max(1)
    }

    /// Blocks in a row.
    fn blocks(&self) -> usize {
        self.hidden.columns().div_ceil(BLOCK)
    }

    /// Tile number `tile` from chunk `first` on.
    fn run_tile(&self, first: usize, tile: usize, partials: Option<&Shared<'_, f32>>) {
        let (rows, columns) = (self.hidden.count(), self.hidden.columns());
        let (chunk, block) = (first + tile / self.blocks(), tile % self.blocks());
        let columns = block * BLOCK..columns.min((block + 1) * BLOCK);
        let sums = self.outputs * columns.len().next_multiple_of(crate::simd::WIDTH);
        self.level.run(ValueHeadBackward {
            hidden: self.hidden,
            weights: &self.weights,
            outputs: self.outputs,
            keep: self.keep.as_ref(),
            scaled: &self.scaled,
            rows: chunk * CHUNK..rows.min((chunk + 1) * CHUNK),
            columns,
            grad_hidden: self.grad_hidden.as_ref().map(Shared::as_mut_ptr),
            // SAFETY: each tile has its own partial sums.
            grad_weight: partials.map(|all| unsafe { all.slice(tile * self.sums(), sums) }),
        });
    }

    /// [`Tiles::run`] on all chunks, wave by wave, and the sums of their partial sums.
    fn run_with_weight(&self, to: &mut [f32], executor: &dyn Executor) -> Result<()> {
        let (columns, chunks) = (self.hidden.columns(), self.hidden.count().div_ceil(CHUNK));
        let blocks = columns.div_ceil(BLOCK);
        let mut partials = Buffer::new(chunks.min(WAVE) * blocks * self.sums())?;
        let mut slots = allocation::filled([0.0_f32; SLOTS], to.len())?;
        for first in (0..chunks).step_by(WAVE) {
            let wave = first..chunks.min(first + WAVE);
            self.run(wave.clone(), Some(&mut partials), executor);
            for_each_chunk(executor, &mut slots, BLOCK, |start, slots| {
                self.deal(start * BLOCK, slots, wave.len(), &partials)
            });
        }
        for (to, slots) in to.iter_mut().zip(&mut slots) {
            *to = reduce::fold_halves(slots);
        }
        Ok(())
    }

    /// Adds a wave's partial sums to the slots of the weights from number `first` on.
    fn deal(&self, first: usize, slots: &mut [[f32; SLOTS]], chunks: usize, partials: &[f32]) {
        let columns = self.hidden.columns();
        let blocks = columns.div_ceil(BLOCK);
        for (i, slots) in slots.iter_mut().enumerate() {
            let (output, column) = ((first + i) / columns, (first + i) % columns);
            let block = column / BLOCK;
            let stride = BLOCK.min(columns - block * BLOCK).next_multiple_of(crate::simd::WIDTH);
            let start = block * self.sums() + output * stride + column % BLOCK;
            for chunk in 0..chunks {
                slots[chunk % SLOTS] += partials[chunk * blocks * self.sums() + start];
            }
        }
    }
}
