//! `value[n, k] = bias[k] + scale * sum_h keep(n, h) * hidden[n, h] * weight[k, h]`.
use crate::head::{Head, check};
use crate::simd::keep::Keep;
use crate::simd::value_head::{ValueHead, Weights};
use crate::threads::try_for_each_chunk;
use crate::{Dropout, Element, Executor, Level, Result, Rows};

/// Bytes of hidden states that are worth waking a thread for.
const SERIAL_BYTES: usize = 64 << 10;
/// Bytes of hidden states in a task: enough to forget the cost of a task, few enough to share out evenly.
const TASK_BYTES: usize = 256 << 10;

/// Writes the value of each row to `values`, `[N, K]` row-major.
///
/// # Errors
/// [`Error::Length`] where the head's width is not the rows', or `values` does not hold `N * K` numbers.
pub fn value_head<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    values: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    value_head_with(Level::best(), hidden, head, dropout, values, executor)
}

/// [`value_head`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`value_head`].
pub fn value_head_with<T: Element>(
    level: Level,
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    values: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    check(level, hidden, head.columns(), "values", values.len(), head.outputs())?;
    let weights = Weights::new(head)?;
    let keep = dropout.map(|dropout| Keep::new(dropout, hidden.columns())).transpose()?;
    let scale = dropout.map_or(1.0, Dropout::scale);
    let rows = rows_in_task(hidden, executor);
    try_for_each_chunk(executor, values, rows * head.outputs(), |task, values| {
        let (keep, first) = (keep.as_ref(), task * rows);
        let bits = &mut *weights.bits(keep)?;
        level.run(ValueHead { hidden, head, weights: &weights, keep, scale, first, bits, values });
        Ok(())
    })
}

/// Rows that one task takes; all of them where threads would not pay.
fn rows_in_task<T: Element>(hidden: &Rows<'_, T>, executor: &dyn Executor) -> usize {
    let row = (hidden.columns() * size_of::<T>()).max(1);
    if executor.threads() == 1 || hidden.count().saturating_mul(row) < SERIAL_BYTES {
        return hidden.count().max(1);
    }
    let even = hidden.count().div_ceil(4 * executor.threads());
    even.min(TASK_BYTES / row).max(1)
}
