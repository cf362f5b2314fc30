//! Arrays that Python lends for the time of a call: the only place where a buffer becomes a slice.
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The elements of a contiguous array, which the caller in Python has made sure of.
pub(crate) fn elements<'a, T: Element>(name: &str, buffer: &'a PyBuffer<T>) -> PyResult<&'a [T]> {
    if !buffer.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{name}: expected a contiguous array")));
    }
    if buffer.item_count() == 0 {
        return Ok(&[]);
    }
    // SAFETY: contiguous and aligned, of this dtype, and kept alive by the buffer. As in torch's own kernels, another thread
    // that writes to the array meanwhile makes the results unspecified.
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.item_count()) })
}

/// The elements of an array that is to be written.
pub(crate) fn overwritten<'a, T: Element>(name: &str, buffer: &'a mut PyBuffer<T>) -> PyResult<&'a mut [T]> {
    if buffer.readonly() || !buffer.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{name}: expected a contiguous array that can be written")));
    }
    if buffer.item_count() == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `elements`; nobody else uses the array, or whoever does sees unspecified values, as with torch's own
    // operations in place.
    Ok(unsafe { std::slice::from_raw_parts_mut(buffer.buf_ptr().cast(), buffer.item_count()) })
}
