//! `value[n, k] = bias[k] + scale * sum_h keep(n, h) * hidden[n, h] * weight[k, h]`.
use crate::simd::keep::Keep;
use crate::simd::project::{Project, Weights};
use crate::threads::try_for_each_chunk;
use crate::{Dropout, Element, Error, Executor, Level, Result, Rows};

/// Bytes of hidden states that are worth waking a thread for.
const SERIAL_BYTES: usize = 64 << 10;
/// Bytes of hidden states in a task: enough to forget the cost of a task, few enough to share out evenly.
const TASK_BYTES: usize = 256 << 10;

/// The weights of a value head: `weight` is `[K, H]` row-major, `bias` is `[K]`.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    outputs: usize,
}

impl<'a> Head<'a> {
    /// A head of `weight.len() / columns` outputs.
    ///
    /// # Errors
    /// [`Error::Length`] where `weight` is not whole rows of `columns`, or `bias` is not one number an output.
    pub fn new(weight: &'a [f32], bias: Option<&'a [f32]>, columns: usize) -> Result<Self> {
        let outputs = weight.len().checked_div(columns).unwrap_or(0);
        if outputs == 0 || outputs * columns != weight.len() {
            return Err(Error::Length { what: "weight", expected: outputs.max(1) * columns, actual: weight.len() });
        }
        match bias {
            Some(bias) if bias.len() != outputs => {
                Err(Error::Length { what: "bias", expected: outputs, actual: bias.len() })
            }
            _ => Ok(Self { weight, bias, outputs }),
        }
    }

    /// Numbers per row: `K`.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Elements in a row: `H`.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.weight.len() / self.outputs
    }

    /// All weights, `[K, H]` row-major.
    #[must_use]
    pub fn weights(&self) -> &'a [f32] {
        self.weight
    }

    /// The weights of output `k`.
    #[must_use]
    pub fn weight(&self, output: usize) -> &'a [f32] {
        &self.weight[output * self.columns()..][..self.columns()]
    }

    /// The bias of output `k`, zero without one.
    #[must_use]
    pub fn bias(&self, output: usize) -> f32 {
        self.bias.map_or(0.0, |bias| bias[output])
    }
}

/// Writes the value of each row to `values`, `[N, K]` row-major.
///
/// # Errors
/// [`Error::Length`] where the head's width is not the rows', or `values` does not hold `N * K` numbers.
pub fn forward<T: Element>(
    hidden: &Rows<'_, T>,
    head: &Head<'_>,
    dropout: Option<&Dropout>,
    values: &mut [f32],
    executor: &dyn Executor,
) -> Result<()> {
    forward_with(Level::best(), hidden, head, dropout, values, executor)
}

/// [`forward`] on a chosen instruction set: for tests and benchmarks, every level gives the same bits.
///
/// # Errors
/// As [`forward`].
pub fn forward_with<T: Element>(
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
        level.run(Project { hidden, head, weights: &weights, keep, scale, first, bits, values });
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

/// What every kernel asks of its arguments; `columns` are the weight's, `actual` is how long what has `outputs` numbers a row
/// is.
pub(crate) fn check<T: Element>(
    level: Level,
    hidden: &Rows<'_, T>,
    columns: usize,
    what: &'static str,
    actual: usize,
    outputs: usize,
) -> Result<()> {
    if !level.is_available() {
        return Err(Error::Level(level.name()));
    }
    if hidden.columns() != columns {
        return Err(Error::Length { what: "weight", expected: hidden.columns(), actual: columns });
    }
    let expected = hidden.count().saturating_mul(outputs);
    if actual != expected {
        return Err(Error::Length { what, expected, actual });
    }
    Ok(())
}
