//! Layers of many outputs, in the one order of additions: `[N, H]` times `[I, H]`, and the two-layer value head.
//!
//! `activation[n, i] = max(0, bias1[i] + scale * sum_h keep(n, h) * hidden[n, h] * weight1[i, h])`, and
//! `value[n, k] = bias2[k] + sum_i activation[n, i] * weight2[k, i]`: both sums in the order of [`crate::reduce`], so that a
//! row's value depends on that row and the weights alone. Here a dropped element is multiplied by zero before it meets the
//! weights, as `torch.nn.Dropout` does. A NaN activation stays NaN.
//!
//! Neither the activations nor a copy of the weights is ever stored: a task multiplies blocks of 32 outputs into the lanes
//! of the second sum as soon as they are there. It owns 32 of the 256 lanes, and so takes their blocks in rising order.
use crate::buffer::Buffer;
use crate::head::check;
use crate::simd::WIDTH;
use crate::simd::keep::Keep;
use crate::simd::two_layer::{Multiply, OUTPUTS, Order, Pack, Read, Second, Sink, Source, Store, Tile, room};
use crate::simd::value_head::Weights;
use crate::threads::{Shared, for_each_chunk, try_for_each_chunk, try_run};
use crate::{Dropout, Element, Error, Executor, Head, Level, Result, Rows, allocation, reduce};
use reduce::LANES;

/// Bytes of packed rows and second sums that are held at once. The weights are packed again for each such chunk of rows.
const CHUNK_BYTES: usize = 16 << 20;

/// Bytes of weight panels that a task multiplies each row panel with: half of a second-level cache.
const PANELS_BYTES: usize = 1 << 20;

/// A layer of many outputs: `weight` is `[I, H]` in any dtype, `bias` is `[I]`.
#[derive(Debug, Clone)]
pub struct Linear<'a, W> {
    weight: Rows<'a, W>,
    bias: Vec<f32>,
}

impl<'a, W: Element> Linear<'a, W> {
    /// A layer of `weight.count()` outputs.
    ///
    /// # Errors
    /// [`Error::Length`] where `weight` is empty, or `bias` is not one number an output.
    pub fn new(weight: Rows<'a, W>, bias: Option<&[f32]>) -> Result<Self> {
        let (outputs, columns) = (weight.count(), weight.columns());
        if outputs == 0 || columns == 0 {
            return Err(Error::Length { what: "weight", expected: outputs.max(1) * columns.max(1), actual: 0 });
        }
        if let Some(bias) = bias.filter(|bias| bias.len() != outputs) {
            return Err(Error::Length { what: "bias", expected: outputs, actual: bias.len() });
        }
        let mut padded = allocation::filled(0.0, outputs.next_multiple_of(OUTPUTS))?;
        for (to, bias) in padded.iter_mut().zip(bias.into_iter().flatten()) {
            *to = bias + 0.0;
        }
        Ok(Self { weight, bias: padded })
    }

    /// Numbers per row: `I`.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.weight.count()
    }

    /// The weights, a row for each output.
    #[must_use]
    pub fn weight(&self) -> &Rows<'a, W> {
        &self.weight
    }

    /// The bias of output `i`, zero without one.
    #[must_use]
    pub fn bias(&self, output: usize) -> f32 {
        self.bias[output]
    }
}

/// A first layer, a ReLU, and the head over it.
#[derive(Debug, Clone)]
pub struct TwoLayerHead<'a, W> {
    first: Linear<'a, W>,
    second: Head<'a>,
}

impl<'a, W: Element> TwoLayerHead<'a, W> {
    /// A head of two layers.
    ///
    /// # Errors
    /// [`Error::Length`] where the second layer does not have one column for each output of the first.
    pub fn new(first: Linear<'a, W>, second: Head<'a>) -> Result<Self> {
        if second.columns() != first.outputs() {
            return Err(Error::Length { what: "weight2", expected: first.outputs(), actual: second.columns() });
        }
        Ok(Self { first, second })
    }

    /// The layer over the hidden states.
    #[must_use]
    pub fn first(&self) -> &Linear<'a, W> {
        &self.first
    }

    /// The layer over the activations.
    #[must_use]
    pub fn second(&self) -> &Head<'a> {
        &self.second
    }
}

/// Writes the value of each row to `values`, `[N, K]` row-major.
///
/// # Errors
/// [`Error::Length`] where the first layer's width is not the rows', or `values` does not hold `N * K` numbers.
pub fn two_layer<T: Element, W: Element>(
    hidden: &Rows<'_, T>,
    head: &TwoLayerHead<'_, W>,
    dropout: Option<&Dropout>,
    values: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    two_layer_with(Level::best(), hidden, head, dropout, values, executor)
}

/// [`two_layer`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`two_layer`].
pub fn two_layer_with<T: Element, W: Element>(
    level: Level,
    hidden: &Rows<'_, T>,
    head: &TwoLayerHead<'_, W>,
    dropout: Option<&Dropout>,
    values: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    let outputs = head.second.outputs();
    check(level, hidden, head.first.weight.columns(), "values", values.len(), outputs)?;
    let keep = dropout.map(|dropout| Keep::new(dropout, hidden.columns())).transpose()?;
    let source = Source { rows: hidden, keep: keep.as_ref(), first_masked: 0 };
    let weights = Weights::new(&head.second)?;
    let chunks = Chunks::new(level, &source, &head.first.weight, LANES * outputs, executor)?;
    for rows in chunks.starts() {
        let panels = chunks.pack(rows)?;
        let mut lanes = Buffer::new(chunks.padded(rows) * outputs * LANES)?;
        let sink = Second {
            lanes: Shared::new(&mut lanes),
            weights: &weights,
            outputs,
            columns: head.first.outputs(),
            scale: dropout.map_or(1.0, Dropout::scale),
            bias: &head.first.bias,
        };
        chunks.multiply(&panels, rows, LANES, &sink)?;
        let count = chunks.rows.min(hidden.count() - rows);
        let values = &mut values[rows * outputs..][..count * outputs];
        for_each_chunk(executor, values, 64 * outputs, |task, values| {
            let lanes = lanes.as_chunks::<LANES>().0[task * 64 * outputs..].iter();
            for (i, (value, lanes)) in values.iter_mut().zip(lanes).enumerate() {
                *value = reduce::fold(lanes) + (head.second.bias(i % outputs) + 0.0);
            }
        });
    }
    Ok(())
}

/// Writes `bias + scale * sum_h keep * hidden * weight`, or the ReLU of that, to `to`, `[N, I]` row-major.
///
/// # Errors
/// [`Error::Length`] where the layer's width is not the rows', or `to` does not hold `N * I` numbers.
pub fn linear<T: Element, W: Element>(
    hidden: &Rows<'_, T>,
    layer: &Linear<'_, W>,
    scale: f32,
    relu: bool,
    to: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    linear_with(Level::best(), hidden, layer, scale, relu, to, executor)
}

/// [`linear`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`linear`].
pub fn linear_with<T: Element, W: Element>(
    level: Level,
    hidden: &Rows<'_, T>,
    layer: &Linear<'_, W>,
    scale: f32,
    relu: bool,
    to: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    let outputs = layer.outputs();
    check(level, hidden, layer.weight.columns(), "outputs", to.len(), outputs)?;
    let source = Source { rows: hidden, keep: None, first_masked: 0 };
    let chunks = Chunks::new(level, &source, &layer.weight, 0, executor)?;
    for rows in chunks.starts() {
        let panels = chunks.pack(rows)?;
        let count = chunks.rows.min(hidden.count() - rows);
        let to = Shared::new(&mut to[rows * outputs..][..count * outputs]);
        let sink = Store { to, rows: count, outputs, scale, bias: &layer.bias, relu };
        chunks.multiply(&panels, rows, outputs.next_multiple_of(OUTPUTS), &sink)?;
    }
    Ok(())
}

/// Writes `keep(first + n, h) * hidden[n, h]` to `to`, `[N, H]` row-major: what a row that dropout has seen looks like.
///
/// # Errors
/// [`Error::Length`] where `to` does not hold `N * H` numbers.
pub fn apply_dropout<T: Element>(
    hidden: &Rows<'_, T>,
    dropout: Option<&Dropout>,
    first: u64,
    to: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    let (columns, expected) = (hidden.columns(), hidden.count().saturating_mul(hidden.columns()));
    if to.len() != expected {
        return Err(Error::Length { what: "kept", expected, actual: to.len() });
    }
    let keep = dropout.map(|dropout| Keep::new(dropout, columns)).transpose()?;
    let source = Source { rows: hidden, keep: keep.as_ref(), first_masked: first };
    try_for_each_chunk(executor, to, columns.max(1), |row, to| {
        let (mut line, mut bits) = (Buffer::new(columns)?, source.bits()?);
        Level::best().run(Read { source: &source, first: row, stride: line.len(), bits: &mut bits, lines: &mut line });
        to.copy_from_slice(&line[..columns]);
        Ok(())
    })
}

/// Rows, a chunk at a time, times weights.
struct Chunks<'a, W> {
    level: Level,
    tile: Tile,
    order: Order,
    source: &'a dyn Pack,
    weight: &'a Rows<'a, W>,
    /// Rows of a chunk: whole tiles.
    rows: usize,
    executor: &'a dyn Executor,
}

impl<'a, W: Element> Chunks<'a, W> {
    /// `extra` is how many numbers a row needs besides its own.
    fn new(
        level: Level,
        source: &'a dyn Pack,
        weight: &'a Rows<'a, W>,
        extra: usize,
        executor: &'a dyn Executor,
    ) -> Result<Self> {
        let tile = Tile::of(level);
        let bytes = (source.columns() + extra) * size_of::<f32>();
        let rows = (CHUNK_BYTES / bytes).next_multiple_of(tile.rows).max(tile.rows);
        Ok(Self { level, tile, order: Order::new(source.columns())?, source, weight, rows, executor })
    }

    fn starts(&self) -> impl Iterator<Item = usize> + use<'a, W> {
        (0..self.source.count()).step_by(self.rows)
    }

    /// Rows of the chunk that starts at row `first`, up to whole tiles.
    fn padded(&self, first: usize) -> usize {
        (self.source.count() - first).next_multiple_of(self.tile.rows).min(self.rows)
    }

    /// The panels of the chunk that starts at row `first`.
    fn pack(&self, first: usize) -> Result<Buffer> {
        let (rows, columns) = (self.padded(first), self.source.columns());
        let mut panels = Buffer::new(rows * columns)?;
        try_for_each_chunk(self.executor, &mut panels[..rows * columns], self.tile.rows * columns, |i, panel| {
            let mut lines = Buffer::new(room(columns, self.tile.rows))?;
            let lines = &mut lines[..room(columns, self.tile.rows)];
            self.source.pack(self.level, &self.order, first + i * self.tile.rows, self.tile.rows, lines, panel)
        })?;
        Ok(panels)
    }

    /// Multiplies the packed rows from `first` on with all weights. Outputs that are a multiple of `period` apart are one task's, which takes
    /// them in rising order.
    fn multiply<K: Sink>(&self, panels: &Buffer, first: usize, period: usize, sink: &K) -> Result<()> {
        let row_panels = self.padded(first) / self.tile.rows;
        let outputs = period.min(self.weight.count().next_multiple_of(OUTPUTS)) / OUTPUTS;
        let shares = self.executor.threads().div_ceil(outputs).min(row_panels);
        let share = row_panels.div_ceil(shares.max(1));
        try_run(self.executor, outputs * shares, &|task| {
            let first = task / outputs * share;
            let rows = first..row_panels.min(first + share);
            let starts = (task % outputs * OUTPUTS..self.weight.count()).step_by(period);
            self.multiply_blocks(panels, rows, starts, sink)
        })
    }

    /// Multiplies some row panels with the blocks of weights that start at `starts`.
    fn multiply_blocks<K: Sink>(
        &self,
        panels: &Buffer,
        rows: std::ops::Range<usize>,
        starts: impl ExactSizeIterator<Item = usize>,
        sink: &K,
    ) -> Result<()> {
        let (columns, width) = (self.source.columns(), self.tile.outputs);
        let source = Source { rows: self.weight, keep: None, first_masked: 0 };
        let count = starts.len() * (OUTPUTS / width);
        let starts = starts.flat_map(|start| (start..start + OUTPUTS).step_by(width));
        let starts = allocation::collected(count, starts)?;
        let group = (PANELS_BYTES / (columns * width * size_of::<f32>())).clamp(1, starts.len());
        let (mut lines, mut weights) = (Buffer::new(room(columns, width))?, Buffer::new(group * columns * width)?);
        for outputs in starts.chunks(group) {
            for (output, panel) in outputs.iter().zip(weights.chunks_exact_mut(columns * width)) {
                source.pack(self.level, &self.order, *output, width, &mut lines[..room(columns, width)], panel)?;
            }
            let (order, weights) = (&self.order, &weights[..]);
            self.level.run(Multiply { order, rows: panels, panels: rows.clone(), weights, outputs, sink });
        }
        Ok(())
    }
}

const _: () = assert!(LANES.is_multiple_of(OUTPUTS) && OUTPUTS.is_multiple_of(WIDTH));
