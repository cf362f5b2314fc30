//! What the CPU computes of a language model's layers: gated layers and attention by its matrix unit, norms and rotations.
use crate::dtype::Int64;
use crate::gate;
use crate::tensor::{Output, TensorView};
use crate::threads::Threads;
use half::bf16;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use vhead_core::{Dtype, with_element};

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

/// Attention over one packed row by the matrix unit, with the memory that one layer after the other needs.
#[pyclass(module = "vhead._native")]
pub(crate) struct Attention {
    memory: vhead_core::Attention,
    visibility: vhead_core::Visibility,
}

#[pymethods]
impl Attention {
    /// What rows see: `ends` and `positions` are int64 `[T]`.
    #[new]
    fn new(ends: &Bound<'_, PyAny>, positions: &Bound<'_, PyAny>) -> PyResult<Self> {
        let ends = TensorView::<Int64>::new("ends", ends)?.integers()?;
        let positions = TensorView::<Int64>::new("positions", positions)?.integers()?;
        let visibility = vhead_core::Visibility::new(&ends, &positions).map_err(gate::to_python)?;
        Ok(Self { memory: vhead_core::Attention::new(), visibility })
    }

    /// Results `[T, heads, E]` of bfloat16 queries `[heads, T, D]`, keys `[key heads, T, D]` and values `[key heads, T, E]`.
    fn apply<'py>(
        &mut self,
        query: &Bound<'py, PyAny>,
        key: &Bound<'py, PyAny>,
        value: &Bound<'py, PyAny>,
        scale: f32,
        window: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = query.py();
        let states = [bf16_rows("query", query)?, bf16_rows("key", key)?, bf16_rows("value", value)?];
        let ([heads, rows, _], [_, _, width]) = (three(&states[0])?, three(&states[2])?);
        let (mut out, threads) = (Output::<bf16>::new(py, &[rows, heads, width])?, Threads::now(py)?);
        let [query, key, value] = states.each_ref().map(|states| states.rows::<bf16>());
        let (to, Self { memory, visibility }) = (out.elements(), self);
        gate::run(py, usize::MAX, || {
            memory.apply([&query, &key, &value], visibility, (scale, window), to, threads.executor())
        })?;
        Ok(out.into_tensor())
    }
}

fn three(states: &TensorView<'_>) -> PyResult<[i64; 3]> {
    let sizes = states.sizes();
    sizes
        .try_into()
        .map_err(|_| PyValueError::new_err(format!("query: expected three dimensions, got {}", sizes.len())))
}

/// `weight * x / sqrt(mean(x^2) + epsilon)` of `x` `[..., H]`, in its dtype, which is the weight's as well.
#[pyfunction]
pub(crate) fn rms_norm<'py>(
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    epsilon: f32,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let x = TensorView::<Dtype>::new("x", x)?.with_contiguous_rows()?;
    let weight = TensorView::<Dtype>::new("weight", weight)?;
    if weight.dtype() != x.dtype() {
        let (expected, actual) = (x.dtype().name(), weight.dtype().name());
        return Err(PyTypeError::new_err(format!("weight: expected {expected}, as x is, got {actual}")));
    }
    let weight = weight.floats()?;
    with_element!(x.dtype(), T => {
        let (mut out, threads) = (Output::<T>::new(py, x.sizes())?, Threads::worth(py, x.count())?);
        let (rows, to) = (x.rows::<T>(), out.elements());
        gate::run(py, x.count(), || vhead_core::rms_norm(&rows, &weight, epsilon, to, threads.executor()))?;
        Ok(out.into_tensor())
    })
}

/// Rotary position embeddings of `x` `[..., heads * D]` in place, by `cos` and `sin` `[..., D]` of its dtype.
#[pyfunction]
pub(crate) fn rotate(x: &Bound<'_, PyAny>, cos: &Bound<'_, PyAny>, sin: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = x.py();
    let mut x = TensorView::<Dtype>::new("x", x)?;
    let [cos, sin] = [("cos", cos), ("sin", sin)]
        .map(|(name, angles)| TensorView::<Dtype>::new(name, angles).and_then(TensorView::with_contiguous_rows));
    let (cos, sin) = (cos?, sin?);
    for (name, angles) in [("cos", &cos), ("sin", &sin)] {
        if angles.dtype() != x.dtype() {
            let (expected, actual) = (x.dtype().name(), angles.dtype().name());
            return Err(PyTypeError::new_err(format!("{name}: expected {expected}, as x is, got {actual}")));
        }
    }
    with_element!(x.dtype(), T => {
        let (count, dtype, threads) = (x.count(), x.dtype().name(), Threads::worth(py, x.count())?);
        let (cos, sin, to) = (cos.rows::<T>(), sin.rows::<T>(), x.overwritten_as::<T>(dtype)?);
        gate::run(py, count, || vhead_core::rotate(to, &cos, &sin, threads.executor()))
    })
}

/// A bfloat16 tensor with a contiguous last dimension: itself where it has one, else a copy.
pub(crate) fn bf16_rows<'py>(name: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<TensorView<'py>> {
    let view = TensorView::<Dtype>::new(name, tensor)?;
    if view.dtype() != Dtype::BFloat16 {
        return Err(PyTypeError::new_err(format!("{name}: expected bfloat16, got {}", view.dtype().name())));
    }
    view.with_contiguous_rows()
}
