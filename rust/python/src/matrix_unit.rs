//! What the CPU's matrix unit computes besides token statistics: gated layers.
use crate::gate;
use crate::tensor::{Output, TensorView};
use crate::threads::Threads;
use half::bf16;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use vhead_core::Dtype;

/// Whether the CPU has a unit for products of bfloat16 matrices (Intel AMX), and the system lets this process use it.
#[pyfunction]
pub(crate) fn has_matrix_unit() -> bool {
    vhead_core::matrix_unit::is_available()
}

/// Gated feed-forward layers by the matrix unit, with the memory that one after the other needs.
#[pyclass(module = "vhead._native")]
pub(crate) struct FeedForward(vhead_core::FeedForward);

#[pymethods]
impl FeedForward {
    #[new]
    fn new() -> Self {
        Self(vhead_core::FeedForward::new())
    }

    /// `down(silu(gate(x)) * up(x))` of bfloat16 `x` `[N, H]` with weights `[I, H]`, `[I, H]` and `[H, I]`.
    fn apply<'py>(
        &mut self,
        x: &Bound<'py, PyAny>,
        gate: &Bound<'py, PyAny>,
        up: &Bound<'py, PyAny>,
        down: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = x.py();
        let x = bf16_rows("x", x)?;
        let weights = [bf16_rows("gate", gate)?, bf16_rows("up", up)?, bf16_rows("down", down)?];
        let (mut out, threads) = (Output::<bf16>::new(py, x.sizes())?, Threads::now(py)?);
        let (rows, to) = (x.rows::<bf16>(), out.elements());
        let [gate, up, down] = weights.each_ref().map(|weight| weight.rows::<bf16>());
        let of = &mut self.0;
        gate::run(py, usize::MAX, || of.apply(&rows, [&gate, &up, &down], to, threads.executor()))?;
        Ok(out.into_tensor())
    }
}

/// A bfloat16 tensor with a contiguous last dimension: itself where it has one, else a copy.
pub(crate) fn bf16_rows<'py>(name: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<TensorView<'py>> {
    let view = TensorView::<Dtype>::new(name, tensor)?;
    if view.dtype() != Dtype::BFloat16 {
        return Err(PyTypeError::new_err(format!("{name}: expected bfloat16, got {}", view.dtype().name())));
    }
    view.with_contiguous_rows()
}
