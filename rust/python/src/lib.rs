//! The PyO3 module `vhead._native`: the list of what it exports, nothing else.
use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _native {}
