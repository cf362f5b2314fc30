//! `value_head_two_layer` on CPU tensors, and what its backward pass is made of.
use crate::backend::DropoutArguments;
use crate::dtype::Float32;
use crate::gate;
use crate::tensor::{Output, TensorView, dropout};
use crate::threads::Threads;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_core::{Dropout, Element, Head, Linear, TwoLayerHead, with_element};

/// Hidden states and a layer over them.
struct Layer<'py> {
    hidden: TensorView<'py>,
    weight: TensorView<'py>,
    bias: Option<TensorView<'py>>,
}

impl<'py> Layer<'py> {
    fn new(
        names: [&'static str; 3],
        hidden: &Bound<'py, PyAny>,
        weight: &Bound<'py, PyAny>,
        bias: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let hidden = TensorView::new(names[0], hidden)?.with_contiguous_rows()?;
        let weight = TensorView::new(names[1], weight)?.with_contiguous_rows()?;
        let bias = bias.map(|bias| TensorView::new(names[2], bias)).transpose()?;
        if hidden.sizes().last().is_none_or(|&columns| columns == 0) {
            let got = hidden.sizes();
            return Err(PyValueError::new_err(format!("{}: expected [..., H] with H >= 1, got {got:?}", names[0])));
        }
        check_weight(names[1], &weight, "I", hidden.columns())?;
        check_bias(names[2], bias.as_ref(), weight.sizes()[0])?;
        Ok(Self { hidden, weight, bias })
    }

    fn outputs(&self) -> usize {
        self.weight.count() / self.weight.columns().max(1)
    }

    /// Elements that the work amounts to.
    fn cost(&self) -> usize {
        self.hidden.count().saturating_mul(self.outputs())
    }

    fn threads(&self, py: Python<'_>) -> PyResult<Threads> {
        Threads::worth(py, self.cost())
    }

    /// `[..., last]`
    fn sizes(&self, last: Option<usize>) -> Vec<i64> {
        let mut sizes = self.hidden.sizes().to_vec();
        sizes.pop();
        sizes.extend(last.map(|last| last as i64));
        sizes
    }
}

fn check_weight(name: &str, weight: &TensorView<'_>, rows: &str, columns: usize) -> PyResult<()> {
    match weight.sizes() {
        [outputs, width] if *outputs > 0 && *width as usize == columns => Ok(()),
        sizes => Err(PyValueError::new_err(format!("{name}: expected [{rows}, {columns}], got {sizes:?}"))),
    }
}

fn check_bias(name: &str, bias: Option<&TensorView<'_>>, outputs: i64) -> PyResult<()> {
    match bias.map(TensorView::sizes) {
        Some(sizes) if sizes != [outputs] => {
            Err(PyValueError::new_err(format!("{name}: expected [{outputs}], got {sizes:?}")))
        }
        _ => Ok(()),
    }
}

/// The kernel of `vhead::value_head_two_layer`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32.
#[pyfunction]
#[pyo3(signature = (hidden, weight1, bias1, weight2, bias2, dropout_p=0.0, seed=None))]
pub(crate) fn value_head_two_layer<'py>(
    hidden: &Bound<'py, PyAny>,
    weight1: &Bound<'py, PyAny>,
    bias1: Option<&Bound<'py, PyAny>>,
    weight2: &Bound<'py, PyAny>,
    bias2: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = hidden.py();
    let first = Layer::new(["hidden", "weight1", "bias1"], hidden, weight1, bias1)?;
    let weight2 = TensorView::new("weight2", weight2)?;
    let bias2 = bias2.map(|bias| TensorView::new("bias2", bias)).transpose()?;
    check_weight("weight2", &weight2, "K", first.outputs())?;
    check_bias("bias2", bias2.as_ref(), weight2.sizes()[0])?;
    let dropout = dropout(DropoutArguments { p: dropout_p, seed })?;
    let outputs = weight2.count() / first.outputs();
    let mut values = Output::<f32>::new(py, &first.sizes((outputs != 1).then_some(outputs)))?;
    with_element!(first.hidden.dtype(), T => with_element!(first.weight.dtype(), W => {
        run_two_layer::<T, W>(py, &first, &weight2, bias2.as_ref(), dropout.as_ref(), values.elements())
    }))?;
    Ok(values.into_tensor())
}

fn run_two_layer<T: Element, W: Element>(
    py: Python<'_>,
    first: &Layer<'_>,
    weight2: &TensorView<'_>,
    bias2: Option<&TensorView<'_>>,
    dropout: Option<&Dropout>,
    values: &mut [f32],
) -> PyResult<()> {
    let (rows, weight, threads) = (first.hidden.rows::<T>(), first.weight.rows::<W>(), first.threads(py)?);
    let bias1 = first.bias.as_ref().map(TensorView::floats).transpose()?;
    let (weight2, bias2) = (weight2.floats()?, bias2.map(TensorView::floats).transpose()?);
    gate::run(py, first.cost(), || {
        let second = Head::new(&weight2, bias2.as_deref(), weight.count())?;
        let head = TwoLayerHead::new(Linear::new(weight, bias1.as_deref())?, second)?;
        vhead_core::two_layer(&rows, &head, dropout, values, threads.executor())
    })
}

/// Writes `scale * (x @ weight.T) + bias` or the ReLU of that to `out`, contiguous float32 `[..., I]`, in the order of the
/// value head's sums.
#[pyfunction]
pub(crate) fn linear(
    x: &Bound<'_, PyAny>,
    weight: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    scale: f32,
    relu: bool,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = x.py();
    let layer = Layer::new(["x", "weight", "bias"], x, weight, bias)?;
    let mut out = TensorView::<Float32>::new("out", out)?;
    let expected = layer.sizes(Some(layer.outputs()));
    if out.sizes() != expected {
        return Err(PyValueError::new_err(format!("out: expected {expected:?}, got {:?}", out.sizes())));
    }
    let to = out.overwritten()?;
    with_element!(layer.hidden.dtype(), T => with_element!(layer.weight.dtype(), W => {
        let (rows, weight, threads) = (layer.hidden.rows::<T>(), layer.weight.rows::<W>(), layer.threads(py)?);
        let bias = layer.bias.as_ref().map(TensorView::floats).transpose()?;
        gate::run(py, layer.cost(), || {
            vhead_core::linear(&rows, &Linear::new(weight, bias.as_deref())?, scale, relu, to, threads.executor())
        })
    }))
}

/// `x` as float32, the elements that dropout drops times zero; its rows are number `first` on of the mask.
#[pyfunction]
pub(crate) fn apply_dropout<'py>(
    x: &Bound<'py, PyAny>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
    first: u64,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let x = TensorView::new("x", x)?.with_contiguous_rows()?;
    let (mut result, cost) = (Output::<f32>::new(py, x.sizes())?, x.count() * gate::DROPOUT_COST);
    let (to, threads) = (result.elements(), Threads::worth(py, cost)?);
    let dropout = dropout(DropoutArguments { p: dropout_p, seed })?;
    with_element!(x.dtype(), T => {
        let rows = x.rows::<T>();
        gate::run(py, cost, || vhead_core::apply_dropout(&rows, dropout.as_ref(), first, to, threads.executor()))
    })?;
    Ok(result.into_tensor())
}
