//! The weights of a value head, and what every kernel asks of its arguments.
use crate::{Element, Error, Level, Result, Rows};

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
