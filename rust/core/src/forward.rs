//! `value[n, k] = bias[k] + scale * sum_h keep(n, h) * hidden[n, h] * weight[k, h]`.
use crate::{Dropout, Element, Error, Executor, Level, Result, Rows};

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
        if columns == 0 || outputs * columns != weight.len() {
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
    let _ = (level, executor); // placeholder until the SIMD kernels land
    let expected = hidden.count() * head.outputs();
    if hidden.columns() != head.columns() {
        return Err(Error::Length { what: "weight", expected: hidden.columns(), actual: head.columns() });
    }
    if values.len() != expected {
        return Err(Error::Length { what: "values", expected, actual: values.len() });
    }
    for (row, values) in values.chunks_exact_mut(head.outputs()).enumerate() {
        for (k, value) in values.iter_mut().enumerate() {
            *value = project(hidden, row, head, k, dropout);
        }
    }
    Ok(())
}

fn project<T: Element>(hidden: &Rows<'_, T>, row: usize, head: &Head<'_>, output: usize, dropout: Option<&Dropout>) -> f32 {
    let mut lanes = [0.0_f32; crate::reduce::LANES];
    let pointer = hidden.row(row);
    for (h, &weight) in head.weight(output).iter().enumerate() {
        let keep = dropout.is_none_or(|d| d.keep(row as u64, (h / 8) as u32)[h % 8]);
        // SAFETY: `h` is below the row's length.
        let x = unsafe { pointer.add(h).read_unaligned() }.to_f32();
        let lane = &mut lanes[h % crate::reduce::LANES];
        *lane = x.mul_add(if keep { weight } else { 0.0 }, *lane);
    }
    crate::reduce::finish(crate::reduce::fold(&lanes), dropout.map_or(1.0, Dropout::scale), head.bias(output))
}
