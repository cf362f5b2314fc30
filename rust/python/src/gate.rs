//! The one gate between Python and the kernels: releases the GIL, catches panics, maps errors.
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

pyo3::import_exception!(vhead.errors, AllocationError);
pyo3::import_exception!(vhead.errors, CudaError);
pyo3::import_exception!(vhead.errors, KernelPanicError);

/// Elements that a kernel streams through in about 20 microseconds. Below that, releasing the GIL costs other threads'
/// turns more than it gives them.
pub(crate) const SMALL: usize = 1 << 16;
/// How many plain elements one element under dropout is worth.
pub(crate) const DROPOUT_COST: usize = 4;

/// Runs `kernel`, which streams through about `elements` elements.
///
/// # Errors
/// The kernel's own error as the Python exception that fits it; `vhead.errors.KernelPanicError` for a panic.
pub(crate) fn run<T, K>(py: Python<'_>, elements: usize, kernel: K) -> PyResult<T>
where
    T: Send,
    K: FnOnce() -> vhead_core::Result<T> + Send,
{
    let caught = || catch_unwind(AssertUnwindSafe(kernel));
    let outcome = if elements > SMALL { py.detach(caught) } else { caught() };
    settle(outcome, to_python)
}

/// Sends work to a CUDA device, without the GIL as torch's own operations do it: where a stream's queue is full, the driver
/// waits for the device, and what the device waits for may need the GIL.
///
/// # Errors
/// As [`run`]; `vhead.errors.CudaError` where the driver or the device is at fault.
pub(crate) fn launch<T, K>(py: Python<'_>, work: K) -> PyResult<T>
where
    T: Send,
    K: FnOnce() -> vhead_cuda::Result<T> + Send,
{
    settle(py.detach(|| catch_unwind(AssertUnwindSafe(work))), cuda_to_python)
}

/// Reads or writes publications of weights, without the GIL.
///
/// # Errors
/// The crate's own error as the Python exception that fits it; `vhead.errors.KernelPanicError` for a panic.
pub(crate) fn sync<T, K>(py: Python<'_>, work: K) -> PyResult<T>
where
    T: Send,
    K: FnOnce() -> vhead_sync::Result<T> + Send,
{
    settle(py.detach(|| catch_unwind(AssertUnwindSafe(work))), crate::sync::to_python)
}

fn settle<T, E>(outcome: std::thread::Result<Result<T, E>>, to_python: fn(E) -> PyErr) -> PyResult<T> {
    match outcome {
        Ok(result) => result.map_err(to_python),
        Err(panic) => Err(KernelPanicError::new_err(format!("a kernel failed inside: {}", message(panic.as_ref())))),
    }
}

/// The Python exception for an error of the CUDA crate.
pub(crate) fn cuda_to_python(error: vhead_cuda::Error) -> PyErr {
    let text = error.to_string();
    if error.is_argument() { PyValueError::new_err(text) } else { CudaError::new_err(text) }
}

/// The Python exception for a kernel's error.
pub(crate) fn to_python(error: vhead_core::Error) -> PyErr {
    let text = error.to_string();
    saying(&error, text)
}

/// The same with other words.
pub(crate) fn saying(error: &vhead_core::Error, text: String) -> PyErr {
    use vhead_core::Error;
    match error {
        Error::Length { .. }
        | Error::Layout { .. }
        | Error::Token { .. }
        | Error::Offsets { .. }
        | Error::NotFinite { .. }
        | Error::NoModelToken { .. }
        | Error::Probability(_)
        | Error::StandardDeviation(_) => PyValueError::new_err(text),
        Error::Allocation { .. } => AllocationError::new_err(text),
        Error::Level(_) => PyRuntimeError::new_err(text),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
