//! Gated feed-forward layers by the matrix unit: `down(silu(gate(x)) * up(x))` of bfloat16 rows and weights.
//!
//! What the first two products give is rounded, gated and packed for the third one while it is in the cache.
use crate::matrix_unit::{GROUP, Line, Packed, TASK_GROUPS, Unit, with_scratch};
use crate::simd::feed_forward::Gate;
use crate::threads::Shared;
use crate::{Error, Executor, Level, Result, Rows};
use half::bf16;

/// Columns whose weights are packed at once; they stay in a second-level cache.
const COLUMNS: usize = 256;
/// Rows whose activations are held at once.
const CHUNK_ROWS: usize = 2048;

/// The memory that layers need while they are computed; one layer after the other may use it.
#[derive(Debug, Default)]
pub struct FeedForward {
    rows: Packed,
    gate: Packed,
    up: Packed,
    activations: Packed,
}

impl FeedForward {
    /// No memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes `down(silu(gate(x)) * up(x))` of rows `[N, H]` to `to`, `[N, H]`; the weights are `[I, H]`, `[I, H]` and
    /// `[H, I]`. Products are added in float32; gate, silu, up, their product and the result are rounded to bfloat16.
    ///
    /// # Errors
    /// [`Error::Length`] where sizes do not fit, [`Error::Level`] without the unit, [`Error::Allocation`].
    pub fn apply(
        &mut self,
        x: &Rows<'_, bf16>,
        weights: [&Rows<'_, bf16>; 3],
        to: &mut [bf16],
        executor: &dyn Executor,
    ) -> Result<()> {
        let [gate, up, down] = weights;
        let (count, inner) = (x.count(), gate.count());
        for (what, expected, actual) in [
            ("gate", x.columns(), gate.columns()),
            ("up", x.columns(), up.columns()),
            ("up", inner, up.count()),
            ("down", inner, down.columns()),
            ("down", x.columns(), down.count()),
            ("out", count * x.columns(), to.len()),
        ] {
            if expected != actual {
                return Err(Error::Length { what, expected, actual });
            }
        }
        if !crate::matrix_unit::is_available() {
            return Err(Error::Level("amx"));
        }
        for (at, to) in to.chunks_mut((CHUNK_ROWS * x.columns()).max(1)).enumerate() {
            let rows = x.part(at * CHUNK_ROWS, to.len() / x.columns());
            self.rows.pack_rows(&rows, executor)?;
            self.activate(rows.count(), gate, up, executor)?;
            self.project(rows.count(), down, to, executor)?;
        }
        Ok(())
    }

    /// Packed activations of the packed rows.
    fn activate(
        &mut self,
        count: usize,
        gate: &Rows<'_, bf16>,
        up: &Rows<'_, bf16>,
        executor: &dyn Executor,
    ) -> Result<()> {
        let (groups, inner) = (count.div_ceil(GROUP), gate.count());
        self.activations.resize(groups, inner)?;
        let (each, to) = (self.activations.group_lines(), self.activations.shared());
        for first in (0..inner).step_by(COLUMNS) {
            let range = first..inner.min(first + COLUMNS);
            let steps = range.len().div_ceil(GROUP);
            self.gate.pack_columns(gate, range.clone(), executor)?;
            self.up.pack_columns(up, range, executor)?;
            let (rows, gate, up) = (self.rows.lines(), &self.gate, &self.up);
            executor.run(groups.div_ceil(TASK_GROUPS), &|task| {
                let (unit, own) = (Unit::new(), task * TASK_GROUPS..groups.min((task + 1) * TASK_GROUPS));
                let size = own.len() * GROUP * GROUP;
                with_scratch(2 * size, |scratch| {
                    let (of_gate, of_up) = scratch.split_at_mut(size);
                    for step in 0..steps {
                        unit.multiply((rows, own.clone()), (gate, step), (of_gate, GROUP));
                        unit.multiply((rows, own.clone()), (up, step), (of_up, GROUP));
                        for (at, group) in own.clone().enumerate() {
                            let start = group * each + (first / GROUP + step) * GROUP;
                            // SAFETY: this step of this group is nobody else's.
                            let lines = unsafe { to.slice(start, GROUP) };
                            let range = at * GROUP * GROUP..(at + 1) * GROUP * GROUP;
                            gated(&of_gate[range.clone()], &of_up[range], lines);
                        }
                    }
                });
            });
        }
        Ok(())
    }

    /// The packed activations' products with the last weight, rounded.
    fn project(&mut self, count: usize, down: &Rows<'_, bf16>, to: &mut [bf16], executor: &dyn Executor) -> Result<()> {
        let to = Shared::new(to);
        for first in (0..down.count()).step_by(COLUMNS) {
            let range = first..down.count().min(first + COLUMNS);
            self.gate.pack_columns(down, range.clone(), executor)?;
            write_products(self.activations.lines(), count, &self.gate, range, &to, down.count(), executor);
        }
        Ok(())
    }
}

/// Writes the rounded products of `count` packed rows with packed columns to those columns of `to`, `[count, width]`.
pub(crate) fn write_products(
    rows: &[Line],
    count: usize,
    columns: &Packed,
    range: std::ops::Range<usize>,
    to: &Shared<'_, bf16>,
    width: usize,
    executor: &dyn Executor,
) {
    let groups = count.div_ceil(GROUP);
    executor.run(groups.div_ceil(TASK_GROUPS), &|task| {
        let (unit, own) = (Unit::new(), task * TASK_GROUPS..groups.min((task + 1) * TASK_GROUPS));
        with_scratch(own.len() * GROUP * GROUP, |products| {
            for at in 0..range.len().div_ceil(GROUP) {
                unit.multiply((rows, own.clone()), (columns, at), (products, GROUP));
                let column = range.start + at * GROUP;
                let written = GROUP.min(range.end - column);
                for (row, products) in (own.start * GROUP..count).zip(products.as_chunks::<GROUP>().0) {
                    // SAFETY: these columns of this row are nobody else's.
                    let to = unsafe { to.slice(row * width + column, written) };
                    Level::Avx512.run(crate::simd::feed_forward::Round { from: products, to });
                }
            }
        });
    });
}

fn gated(gate: &[f32], up: &[f32], to: &mut [Line]) {
    for ((gate, up), to) in gate.as_chunks().0.iter().zip(up.as_chunks().0).zip(to) {
        Level::Avx512.run(Gate { gate, up, to: &mut to.0 });
    }
}
