//! How many numbers a row gets, and the sizes of what holds them: the same wherever the tensors are.
use crate::description::unsigned;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// What the sizes of a head's arguments say.
#[derive(Debug)]
pub(crate) struct Shapes {
    /// `K`.
    pub(crate) outputs: usize,
    /// `[...]` for one output, `[..., K]` for several.
    pub(crate) values: Vec<i64>,
}

impl Shapes {
    /// # Errors
    /// `ValueError` where the arguments' sizes do not fit together.
    pub(crate) fn new(hidden: &[i64], weight: &[i64], bias: Option<&[i64]>) -> PyResult<Self> {
        let Some((&columns, outer)) = hidden.split_last().filter(|(columns, _)| **columns > 0) else {
            return Err(PyValueError::new_err(format!("hidden: expected [..., H] with H >= 1, got {hidden:?}")));
        };
        let outputs = match *weight {
            [width] if width == columns => 1,
            [outputs, width] if width == columns && outputs > 0 => outputs,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "weight: expected [K, {columns}] or [{columns}] for hidden states {hidden:?}, got {weight:?}"
                )));
            }
        };
        if let Some(sizes) = bias.filter(|sizes| *sizes != [outputs]) {
            return Err(PyValueError::new_err(format!("bias: expected [{outputs}], got {sizes:?}")));
        }
        let mut values = outer.to_vec();
        values.extend((outputs != 1).then_some(outputs));
        Ok(Self { outputs: unsigned(outputs), values })
    }

    /// # Errors
    /// `ValueError` where the gradient of the values does not have their sizes.
    pub(crate) fn check_grad(&self, sizes: &[i64]) -> PyResult<()> {
        if sizes == self.values {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("grad: expected {:?}, got {sizes:?}", self.values)))
    }
}
