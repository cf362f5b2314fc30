//! Fresh weights: numbers that are a function of a seed.
use crate::gate;
use crate::tensor::Output;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
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
    let (stream, mut out) = (stream(parameter)?, Output::<f32>::new(py, &sizes)?);
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
    let (stream, mut out) = (stream(parameter)?, Output::<f32>::new(py, &sizes)?);
    let numbers = out.elements();
    gate::run(py, numbers.len(), || init::normal(numbers, std, stream, seed.cast_unsigned()))?;
    Ok(out.into_tensor())
}
