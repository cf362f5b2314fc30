//! `value_head`, forward and backward, where the hidden states are.
use crate::backend::{DropoutArguments, HeadArguments, HeadGradients, is_true};
use crate::backends::backend_of;
use crate::torch::Torch;
use pyo3::intern;
use pyo3::prelude::*;

/// The kernel of `vhead::value_head`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32.
#[pyfunction]
#[pyo3(signature = (hidden, weight, bias=None, dropout_p=0.0, seed=None))]
pub(crate) fn value_head<'py>(
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let head = HeadArguments { hidden, weight, bias };
    backend_of("hidden", hidden)?.value_head(head, DropoutArguments { p: dropout_p, seed })
}

/// `value_head` without dropout where every argument is a plain tensor on one device whose kernels are loaded, and needs no
/// gradient; `None` otherwise, and for whatever else is unusual: the caller then takes the way that explains.
#[pyfunction]
pub(crate) fn try_value_head<'py>(
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    grad_enabled: bool,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (py, torch) = (hidden.py(), Torch::get(hidden.py())?);
    for tensor in [Some(hidden), Some(weight), bias].into_iter().flatten() {
        if !torch.is_plain(tensor) || (grad_enabled && is_true(tensor, intern!(py, "requires_grad"))?) {
            return Ok(None);
        }
    }
    match backend_of("hidden", hidden) {
        Ok(backend) => backend.try_value_head(HeadArguments { hidden, weight, bias }),
        Err(_) => Ok(None),
    }
}

/// Gradients of `value_head` for (hidden, weight, bias), each where `needed`: hidden's in its dtype, the others float32.
#[pyfunction]
pub(crate) fn value_head_backward<'py>(
    grad: &Bound<'py, PyAny>,
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
    needed: [bool; 3],
) -> PyResult<HeadGradients<'py>> {
    let head = HeadArguments { hidden, weight, bias: None };
    backend_of("hidden", hidden)?.value_head_backward(grad, head, DropoutArguments { p: dropout_p, seed }, needed)
}
