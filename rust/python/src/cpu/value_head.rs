//! `value_head` on CPU tensors, forward and backward.
use crate::backend::{DropoutArguments, HeadArguments, HeadGradients};
use crate::dtype::Float32;
use crate::gate;
use crate::shapes::Shapes;
use crate::tensor::{Output, TensorView, dropout};
use crate::threads::Threads;
use pyo3::prelude::*;
use vhead_core::{Dropout, Element, Gradients, Head, with_element};

/// The checked arguments of a head.
struct Arguments<'py> {
    hidden: TensorView<'py>,
    weight: TensorView<'py>,
    bias: Option<TensorView<'py>>,
    shapes: Shapes,
}

impl<'py> Arguments<'py> {
    fn new(head: HeadArguments<'_, 'py>) -> PyResult<Self> {
        let hidden = TensorView::new("hidden", head.hidden)?.with_contiguous_rows()?;
        let weight = TensorView::new("weight", head.weight)?;
        let bias = head.bias.map(|bias| TensorView::new("bias", bias)).transpose()?;
        let shapes = Shapes::new(hidden.sizes(), weight.sizes(), bias.as_ref().map(TensorView::sizes))?;
        Ok(Self { hidden, weight, bias, shapes })
    }

    /// Elements that the work amounts to.
    fn cost(&self, dropout: Option<&Dropout>) -> usize {
        let each = if dropout.is_some() { gate::DROPOUT_COST } else { 1 };
        self.hidden.count().saturating_mul(self.shapes.outputs).saturating_mul(each)
    }

    fn forward(&self, py: Python<'py>, dropout: Option<&Dropout>) -> PyResult<Bound<'py, PyAny>> {
        with_element!(self.hidden.dtype(), T => self.forward_of::<T>(py, dropout))
    }

    fn forward_of<T: Element>(&self, py: Python<'py>, dropout: Option<&Dropout>) -> PyResult<Bound<'py, PyAny>> {
        let mut values = Output::<f32>::new(py, &self.shapes.values)?;
        let (rows, weight) = (self.hidden.rows::<T>(), self.weight.floats()?);
        let bias = self.bias.as_ref().map(TensorView::floats).transpose()?;
        let cost = self.cost(dropout);
        let (threads, out) = (Threads::worth(py, cost)?, values.elements());
        gate::run(py, cost, || {
            let head = Head::new(&weight, bias.as_deref(), rows.columns())?;
            vhead_core::value_head(&rows, &head, dropout, out, threads.executor())
        })?;
        Ok(values.into_tensor())
    }

    fn backward_of<T: Element>(
        &self,
        py: Python<'py>,
        grad: &[f32],
        dropout: Option<&Dropout>,
        needed: [bool; 3],
    ) -> PyResult<HeadGradients<'py>> {
        let sizes = [self.shapes.outputs as i64];
        let mut grad_hidden = needed[0].then(|| Output::<T>::new(py, self.hidden.sizes())).transpose()?;
        let mut grad_weight = needed[1].then(|| Output::<f32>::new(py, self.weight.sizes())).transpose()?;
        let mut grad_bias = needed[2].then(|| Output::<f32>::new(py, &sizes)).transpose()?;
        let (rows, weight, cost) = (self.hidden.rows::<T>(), self.weight.floats()?, self.cost(dropout));
        let threads = Threads::worth(py, cost)?;
        let gradients = Gradients {
            hidden: grad_hidden.as_mut().map(Output::elements),
            weight: grad_weight.as_mut().map(Output::elements),
            bias: grad_bias.as_mut().map(Output::elements),
        };
        gate::run(py, cost, || {
            let head = Head::new(&weight, None, rows.columns())?;
            vhead_core::value_head_backward(&rows, &head, dropout, grad, gradients, threads.executor())
        })?;
        Ok((
            grad_hidden.map(Output::into_tensor),
            grad_weight.map(Output::into_tensor),
            grad_bias.map(Output::into_tensor),
        ))
    }
}

/// [`crate::backend::Backend::value_head`].
pub(super) fn value_head<'py>(
    head: HeadArguments<'_, 'py>,
    dropout_arguments: DropoutArguments<'_, 'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let dropout = dropout(dropout_arguments)?;
    Arguments::new(head)?.forward(head.hidden.py(), dropout.as_ref())
}

/// [`crate::backend::Backend::try_value_head`].
pub(super) fn try_value_head<'py>(head: HeadArguments<'_, 'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
    match Arguments::new(head) {
        Ok(arguments) => arguments.forward(head.hidden.py(), None).map(Some),
        Err(_) => Ok(None),
    }
}

/// [`crate::backend::Backend::value_head_backward`].
pub(super) fn value_head_backward<'py>(
    grad: &Bound<'py, PyAny>,
    head: HeadArguments<'_, 'py>,
    dropout_arguments: DropoutArguments<'_, 'py>,
    needed: [bool; 3],
) -> PyResult<HeadGradients<'py>> {
    let dropout = dropout(dropout_arguments)?;
    let arguments = Arguments::new(head)?;
    let grad = TensorView::<Float32>::new("grad", grad)?;
    arguments.shapes.check_grad(grad.sizes())?;
    let (py, grad) = (head.hidden.py(), grad.elements()?);
    with_element!(arguments.hidden.dtype(), T => arguments.backward_of::<T>(py, &grad, dropout.as_ref(), needed))
}
