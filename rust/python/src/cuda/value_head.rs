//! `value_head` on CUDA tensors, forward and backward.
use super::view::CudaView;
use crate::backend::{DropoutArguments, HeadArguments, HeadGradients};
use crate::dtype::{Float32, Int64};
use crate::gate;
use crate::shapes::Shapes;
use crate::tensor::TensorView;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_cuda::{
    Device, DeviceDropout, DeviceGradients, DeviceHead, DeviceRows, Seed, Stream, WeightGradient, partials,
};

/// The checked arguments of a head, in device memory.
struct Arguments<'py> {
    hidden: CudaView<'py>,
    rows: DeviceRows,
    weight: CudaView<'py, Float32>,
    bias: Option<CudaView<'py, Float32>>,
    shapes: Shapes,
    stream: Stream,
}

impl<'py> Arguments<'py> {
    fn new(head: HeadArguments<'_, 'py>) -> PyResult<Self> {
        let hidden = CudaView::new("hidden", head.hidden)?;
        let weight = hidden.beside("weight", head.weight)?;
        let bias = head.bias.map(|bias| hidden.beside("bias", bias)).transpose()?;
        let shapes = Shapes::new(hidden.sizes(), weight.sizes(), bias.as_ref().map(CudaView::sizes))?;
        let stream = hidden.stream()?;
        let (hidden, rows) = hidden.rows()?;
        Ok(Self {
            hidden,
            rows,
            weight: weight.floats()?,
            bias: bias.map(CudaView::floats).transpose()?,
            shapes,
            stream,
        })
    }

    fn head(&self) -> PyResult<DeviceHead> {
        let outputs = u32::try_from(self.shapes.outputs)?;
        Ok(DeviceHead { weight: self.weight.address(), bias: self.bias.as_ref().map_or(0, CudaView::address), outputs })
    }

    fn forward(&self, py: Python<'py>, dropout: Option<DeviceDropout>) -> PyResult<Bound<'py, PyAny>> {
        let values = self.hidden.new_empty("values", &self.shapes.values, Float32)?;
        let (ordinal, address, head) = (self.hidden.ordinal(), values.address(), self.head()?);
        let (rows, stream) = (self.rows, self.stream);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: torch promises that the tensors' sizes and strides stay inside memory of this device; it orders other
            // work on them, and the reuse of their memory, by the stream.
            unsafe { device.value_head(stream, &rows, &head, dropout.as_ref(), address) }
        })?;
        Ok(values.into_tensor())
    }
}

/// The mask's rule. A seed that is where the hidden states are is read there by the kernel, so that nothing waits for it and
/// a captured graph draws anew; another one is read here.
fn dropout(hidden: &CudaView<'_>, arguments: DropoutArguments<'_, '_>) -> PyResult<Option<DeviceDropout>> {
    let seed = match (arguments.number()?, arguments.seed) {
        (Some(number), _) => Seed::Value(number),
        (None, Some(tensor)) => match hidden.beside::<Int64>("seed", tensor) {
            Ok(seed) if seed.count() == 1 => Seed::Address(seed.address()),
            Ok(seed) => {
                let sizes = seed.sizes();
                return Err(PyValueError::new_err(format!("seed: expected one int64 number, got sizes {sizes:?}")));
            }
            Err(_) => Seed::Value(TensorView::<Int64>::new("seed", tensor)?.seed()?),
        },
        (None, None) => Seed::Value(0),
    };
    arguments.checked(DeviceDropout::new(arguments.p, seed).map_err(gate::cuda_to_python)?)
}

/// [`crate::backend::Backend::value_head`].
pub(super) fn value_head<'py>(
    head: HeadArguments<'_, 'py>,
    dropout_arguments: DropoutArguments<'_, 'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let arguments = Arguments::new(head)?;
    let dropout = dropout(&arguments.hidden, dropout_arguments)?;
    arguments.forward(head.hidden.py(), dropout)
}

/// [`crate::backend::Backend::try_value_head`].
pub(super) fn try_value_head<'py>(head: HeadArguments<'_, 'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
    match Arguments::new(head) {
        Ok(arguments) if Device::is_loaded(arguments.hidden.ordinal()) => {
            arguments.forward(head.hidden.py(), None).map(Some)
        }
        _ => Ok(None),
    }
}

/// [`crate::backend::Backend::value_head_backward`].
pub(super) fn value_head_backward<'py>(
    grad: &Bound<'py, PyAny>,
    head: HeadArguments<'_, 'py>,
    dropout_arguments: DropoutArguments<'_, 'py>,
    needed: [bool; 3],
) -> PyResult<HeadGradients<'py>> {
    let (py, arguments) = (head.hidden.py(), Arguments::new(head)?);
    let dropout = dropout(&arguments.hidden, dropout_arguments)?;
    let grad = arguments.hidden.beside::<Float32>("grad", grad)?;
    arguments.shapes.check_grad(grad.sizes())?;
    let (grad, outputs) = (grad.contiguous()?, Outputs::new(&arguments, needed)?);
    let (ordinal, head, gradients, grad_values) =
        (arguments.hidden.ordinal(), arguments.head()?, outputs.addresses(), grad.address());
    let (rows, stream) = (arguments.rows, arguments.stream);
    gate::launch(py, || {
        let device = Device::get(ordinal)?;
        // SAFETY: as in `Arguments::forward`.
        unsafe { device.value_head_backward(stream, &rows, &head, dropout.as_ref(), grad_values, &gradients) }
    })?;
    let Outputs { hidden, weight, bias, partials: _ } = outputs;
    Ok((hidden.map(CudaView::into_tensor), weight.map(CudaView::into_tensor), bias.map(CudaView::into_tensor)))
}

/// The gradients that were asked for, and the scratch of the weight's.
struct Outputs<'py> {
    hidden: Option<CudaView<'py>>,
    weight: Option<CudaView<'py, Float32>>,
    bias: Option<CudaView<'py, Float32>>,
    partials: Option<CudaView<'py, Float32>>,
}

impl<'py> Outputs<'py> {
    fn new(arguments: &Arguments<'py>, needed: [bool; 3]) -> PyResult<Self> {
        let Arguments { hidden, weight, rows, shapes, .. } = arguments;
        let scratch = i64::try_from(partials(rows, u32::try_from(shapes.outputs)?))?;
        let floats =
            |needed: bool, name, sizes: &[i64]| needed.then(|| hidden.new_empty(name, sizes, Float32)).transpose();
        let new_hidden = || hidden.new_empty("grad_hidden", hidden.sizes(), hidden.dtype());
        Ok(Self {
            hidden: needed[0].then(new_hidden).transpose()?,
            weight: floats(needed[1], "grad_weight", weight.sizes())?,
            bias: floats(needed[2], "grad_bias", &[shapes.outputs as i64])?,
            partials: floats(needed[1], "partials", &[scratch])?,
        })
    }

    fn addresses(&self) -> DeviceGradients {
        let weight = self.weight.as_ref().zip(self.partials.as_ref());
        DeviceGradients {
            hidden: self.hidden.as_ref().map(CudaView::address),
            weight: weight.map(|(to, scratch)| WeightGradient { address: to.address(), partials: scratch.address() }),
            bias: self.bias.as_ref().map(CudaView::address),
        }
    }
}
