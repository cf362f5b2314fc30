//! Numbers that are a function of a seed: fresh weights, dropout masks.
use crate::gate;
use crate::tensor::Output;
use crate::torch::Dtype;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vhead_core::allocation::filled;
use vhead_core::dropout::Dropout;
use vhead_core::init;
use vhead_core::philox::Stream;

fn stream(name: &str) -> PyResult<Stream> {
    match name {
        "weight" => Ok(Stream::Weight),
        "bias" => Ok(Stream::Bias),
        _ => Err(PyValueError::new_err(format!("stream: expected weight or bias, got {name}"))),
    }
}

/// A new float32 tensor of `sizes` from `nn.Linear(columns, _)`'s default distribution.
#[pyfunction]
pub(crate) fn init_linear<'py>(
    py: Python<'py>,
    sizes: Vec<i64>,
    columns: usize,
    parameter: &str,
    seed: i64,
) -> PyResult<Bound<'py, PyAny>> {
    let (stream, mut out) = (stream(parameter)?, Output::new(py, &sizes, Dtype::Float32)?);
    let numbers = out.elements();
    gate::run(py, numbers.len(), || {
        init::linear_default(numbers, columns, stream, seed.cast_unsigned());
        Ok(())
    })?;
    Ok(out.into_tensor())
}

/// A new float32 tensor of `sizes` from N(0, `std`^2).
#[pyfunction]
pub(crate) fn init_normal<'py>(
    py: Python<'py>,
    sizes: Vec<i64>,
    std: f32,
    parameter: &str,
    seed: i64,
) -> PyResult<Bound<'py, PyAny>> {
    let (stream, mut out) = (stream(parameter)?, Output::new(py, &sizes, Dtype::Float32)?);
    let numbers = out.elements();
    gate::run(py, numbers.len(), || init::normal(numbers, std, stream, seed.cast_unsigned()))?;
    Ok(out.into_tensor())
}

/// The mask of `[rows, columns]` elements, row-major, one byte each: 1 is kept.
#[pyfunction]
pub(crate) fn dropout_mask(
    py: Python<'_>,
    rows: usize,
    columns: usize,
    dropout_p: f64,
    seed: i64,
) -> PyResult<Bound<'_, PyBytes>> {
    let mask = gate::run(py, usize::MAX, || {
        let mut mask = filled(true, rows.saturating_mul(columns))?;
        if let Some(dropout) = Dropout::new(dropout_p, seed.cast_unsigned())? {
            dropout.mask(columns, &mut mask)?;
        }
        Ok(mask)
    })?;
    PyBytes::new_with(py, mask.len(), |bytes| {
        bytes.iter_mut().zip(mask).for_each(|(byte, kept)| *byte = u8::from(kept));
        Ok(())
    })
}
