//! `value_head` on CPU tensors, forward and backward.
use crate::description::unsigned;
use crate::gate;
use crate::tensor::{Output, TensorView};
use crate::threads::Threads;
use crate::torch::{Dtype, Torch};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use std::borrow::Cow;
use vhead_core::{Dropout, Element, Gradients, Head};

/// How many numbers a row gets, and the sizes of what holds them: the same wherever the tensors are.
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
}

/// The checked arguments of a head.
struct Arguments<'py> {
    hidden: TensorView<'py>,
    weight: TensorView<'py>,
    bias: Option<TensorView<'py>>,
    dropout: Option<Dropout>,
    shapes: Shapes,
}

impl<'py> Arguments<'py> {
    fn new(
        hidden: &Bound<'py, PyAny>,
        weight: &Bound<'py, PyAny>,
        bias: Option<&Bound<'py, PyAny>>,
        dropout: Option<Dropout>,
    ) -> PyResult<Self> {
        let hidden = TensorView::new("hidden", hidden, &Dtype::FLOATS)?.with_contiguous_rows()?;
        let weight = TensorView::new("weight", weight, &Dtype::FLOATS)?;
        let bias = bias.map(|bias| TensorView::new("bias", bias, &Dtype::FLOATS)).transpose()?;
        let shapes = Shapes::new(hidden.sizes(), weight.sizes(), bias.as_ref().map(TensorView::sizes))?;
        Ok(Self { hidden, weight, bias, dropout, shapes })
    }

    /// Elements that the work amounts to.
    fn cost(&self) -> usize {
        let each = if self.dropout.is_some() { gate::DROPOUT_COST } else { 1 };
        self.hidden.count().saturating_mul(self.shapes.outputs).saturating_mul(each)
    }

    fn threads(&self, py: Python<'_>) -> PyResult<Threads> {
        if self.cost() > gate::SMALL { Threads::now(py) } else { Ok(Threads::Caller(vhead_core::Serial)) }
    }

    fn forward<T: Element>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let mut values = Output::new(py, &self.shapes.values, Dtype::Float32)?;
        let (rows, weight) = (self.hidden.rows::<T>(), self.weight.floats()?);
        let bias = self.bias.as_ref().map(TensorView::floats).transpose()?;
        let (dropout, threads, out) = (self.dropout, self.threads(py)?, values.elements());
        gate::run(py, self.cost(), || {
            let head = Head::new(&weight, bias.as_deref(), rows.columns())?;
            vhead_core::forward(&rows, &head, dropout.as_ref(), out, threads.executor())
        })?;
        Ok(values.into_tensor())
    }

    fn backward<T: Element>(&self, py: Python<'py>, grad: &[f32], outputs: &mut Outputs<'py>) -> PyResult<()> {
        let (rows, weight) = (self.hidden.rows::<T>(), self.weight.floats()?);
        let (dropout, threads) = (self.dropout, self.threads(py)?);
        let gradients = Gradients {
            hidden: outputs.hidden.as_mut().map(Output::elements::<T>),
            weight: outputs.weight.as_mut().map(Output::elements),
            bias: outputs.bias.as_mut().map(Output::elements),
        };
        gate::run(py, self.cost(), || {
            let head = Head::new(&weight, None, rows.columns())?;
            vhead_core::backward(&rows, &head, dropout.as_ref(), grad, gradients, threads.executor())
        })
    }
}

/// The gradients that were asked for.
struct Outputs<'py> {
    hidden: Option<Output<'py>>,
    weight: Option<Output<'py>>,
    bias: Option<Output<'py>>,
}

pub(crate) fn dropout(p: f64, seed: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Dropout>> {
    let number = seed.map_or(Ok(0), |seed| TensorView::new("seed", seed, &[Dtype::Int64])?.seed())?;
    match Dropout::new(p, number).map_err(gate::to_python)? {
        Some(_) if seed.is_none() => {
            Err(PyValueError::new_err("seed: expected an int64 tensor with dropout, got None"))
        }
        dropout => Ok(dropout),
    }
}

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
    forward(hidden.py(), &Arguments::new(hidden, weight, bias, dropout(dropout_p, seed)?)?)
}

fn forward<'py>(py: Python<'py>, arguments: &Arguments<'py>) -> PyResult<Bound<'py, PyAny>> {
    match arguments.hidden.dtype() {
        Dtype::BFloat16 => arguments.forward::<bf16>(py),
        Dtype::Float16 => arguments.forward::<f16>(py),
        Dtype::Float32 | Dtype::Int64 => arguments.forward::<f32>(py),
    }
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
        if !torch.is_plain(tensor) || (grad_enabled && tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()?) {
            return Ok(None);
        }
    }
    if !hidden.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
        return crate::cuda::head::try_forward(hidden, weight, bias);
    }
    match Arguments::new(hidden, weight, bias, None) {
        Ok(arguments) => forward(py, &arguments).map(Some),
        Err(_) => Ok(None),
    }
}

type Gradient<'py> = Option<Bound<'py, PyAny>>;

/// Gradients of `value_head` for (hidden, weight, bias), each where `needed`: hidden's in its dtype, the others float32.
#[pyfunction]
pub(crate) fn value_head_backward<'py>(
    grad: &Bound<'py, PyAny>,
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
    needed: [bool; 3],
) -> PyResult<(Gradient<'py>, Gradient<'py>, Gradient<'py>)> {
    let py = hidden.py();
    let arguments = Arguments::new(hidden, weight, None, dropout(dropout_p, seed)?)?;
    let grad = TensorView::new("grad", grad, &[Dtype::Float32])?;
    if grad.sizes() != arguments.shapes.values {
        let (expected, actual) = (&arguments.shapes.values, grad.sizes());
        return Err(PyValueError::new_err(format!("grad: expected {expected:?}, got {actual:?}")));
    }
    let mut outputs = allocate(py, &arguments, needed)?;
    let grad: Cow<'_, [f32]> = grad.floats()?;
    match arguments.hidden.dtype() {
        Dtype::BFloat16 => arguments.backward::<bf16>(py, &grad, &mut outputs)?,
        Dtype::Float16 => arguments.backward::<f16>(py, &grad, &mut outputs)?,
        Dtype::Float32 | Dtype::Int64 => arguments.backward::<f32>(py, &grad, &mut outputs)?,
    }
    let Outputs { hidden, weight, bias } = outputs;
    Ok((hidden.map(Output::into_tensor), weight.map(Output::into_tensor), bias.map(Output::into_tensor)))
}

fn allocate<'py>(py: Python<'py>, arguments: &Arguments<'py>, needed: [bool; 3]) -> PyResult<Outputs<'py>> {
    let output = |needed: bool, sizes: &[i64], dtype| needed.then(|| Output::new(py, sizes, dtype)).transpose();
    Ok(Outputs {
        hidden: output(needed[0], arguments.hidden.sizes(), arguments.hidden.dtype())?,
        weight: output(needed[1], arguments.weight.sizes(), Dtype::Float32)?,
        bias: output(needed[2], &[arguments.shapes.outputs as i64], Dtype::Float32)?,
    })
}
