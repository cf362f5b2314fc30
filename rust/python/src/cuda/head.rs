//! `value_head` on CUDA tensors, forward and backward.
use super::CudaView;
use crate::gate;
use crate::head::Shapes;
use crate::tensor::TensorView;
use crate::torch::Dtype;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_cuda::{
    Device, DeviceDropout, DeviceGradients, DeviceHead, DeviceRows, Seed, Stream, WeightGradient, partials,
};

/// The checked arguments of a head, in device memory.
struct Arguments<'py> {
    hidden: CudaView<'py>,
    rows: DeviceRows,
    weight: CudaView<'py>,
    bias: Option<CudaView<'py>>,
    shapes: Shapes,
    stream: Stream,
}

impl<'py> Arguments<'py> {
    fn new(hidden: &Bound<'py, PyAny>, weight: &Bound<'py, PyAny>, bias: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        let hidden = CudaView::new("hidden", hidden, &Dtype::FLOATS)?;
        let weight = hidden.beside("weight", weight, &Dtype::FLOATS)?;
        let bias = bias.map(|bias| hidden.beside("bias", bias, &Dtype::FLOATS)).transpose()?;
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
        let values = self.hidden.new_empty("values", &self.shapes.values, Dtype::Float32)?;
        let (ordinal, address, head) = (self.hidden.ordinal(), values.address(), self.head()?);
        let (rows, stream) = (self.rows, self.stream);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: torch promises that the tensors' sizes and strides stay inside memory of this device; it orders other
            // work on them, and the reuse of their memory, by the stream.
            unsafe { device.forward(stream, &rows, &head, dropout.as_ref(), address) }
        })?;
        Ok(values.into_tensor())
    }
}

/// The mask's rule. A seed that is where the hidden states are is read there by the kernel, so that nothing waits for it and
/// a captured graph draws anew; another one is read here.
fn dropout(hidden: &CudaView<'_>, p: f64, seed: Option<&Bound<'_, PyAny>>) -> PyResult<Option<DeviceDropout>> {
    let seed = match seed {
        None => None,
        Some(number) if !number.hasattr("device")? => Some(Seed::Value(number.extract::<i64>()?.cast_unsigned())),
        Some(tensor) => match hidden.beside("seed", tensor, &[Dtype::Int64]) {
            Ok(seed) if seed.count() == 1 => Some(Seed::Address(seed.address())),
            Ok(seed) => {
                let sizes = seed.sizes();
                return Err(PyValueError::new_err(format!("seed: expected one int64 number, got sizes {sizes:?}")));
            }
            Err(_) => Some(Seed::Value(TensorView::new("seed", tensor, &[Dtype::Int64])?.seed()?)),
        },
    };
    match DeviceDropout::new(p, seed.unwrap_or(Seed::Value(0))).map_err(gate::cuda_to_python)? {
        Some(_) if seed.is_none() => {
            Err(PyValueError::new_err("seed: expected an int64 tensor with dropout, got None"))
        }
        dropout => Ok(dropout),
    }
}

/// The CUDA kernel of `vhead::value_head`: `[..., H]` -> `[...]`, or `[..., K]` for `K` > 1, float32.
#[pyfunction]
#[pyo3(signature = (hidden, weight, bias=None, dropout_p=0.0, seed=None))]
pub(crate) fn cuda_value_head<'py>(
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let arguments = Arguments::new(hidden, weight, bias)?;
    let dropout = dropout(&arguments.hidden, dropout_p, seed)?;
    arguments.forward(hidden.py(), dropout)
}

/// As [`crate::head::try_value_head`], for tensors on a device whose kernels are loaded.
pub(crate) fn try_forward<'py>(
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    match Arguments::new(hidden, weight, bias) {
        Ok(arguments) if Device::is_loaded(arguments.hidden.ordinal()) => {
            arguments.forward(hidden.py(), None).map(Some)
        }
        _ => Ok(None),
    }
}

type Gradient<'py> = Option<Bound<'py, PyAny>>;

/// Gradients of `value_head` for (hidden, weight, bias), each where `needed`: hidden's in its dtype, the others float32.
#[pyfunction]
pub(crate) fn cuda_value_head_backward<'py>(
    grad: &Bound<'py, PyAny>,
    hidden: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    dropout_p: f64,
    seed: Option<&Bound<'py, PyAny>>,
    needed: [bool; 3],
) -> PyResult<(Gradient<'py>, Gradient<'py>, Gradient<'py>)> {
    let py = hidden.py();
    let arguments = Arguments::new(hidden, weight, None)?;
    let dropout = dropout(&arguments.hidden, dropout_p, seed)?;
    let grad = arguments.hidden.beside("grad", grad, &[Dtype::Float32])?;
    if grad.sizes() != arguments.shapes.values {
        let (expected, actual) = (&arguments.shapes.values, grad.sizes());
        return Err(PyValueError::new_err(format!("grad: expected {expected:?}, got {actual:?}")));
    }
    let (grad, outputs) = (grad.contiguous()?, Outputs::new(&arguments, needed)?);
    let (ordinal, head, gradients, grad) =
        (arguments.hidden.ordinal(), arguments.head()?, outputs.addresses(), grad.address());
    let (rows, stream) = (arguments.rows, arguments.stream);
    gate::launch(py, || {
        let device = Device::get(ordinal)?;
        // SAFETY: as in `Arguments::forward`.
        unsafe { device.backward(stream, &rows, &head, dropout.as_ref(), grad, &gradients) }
    })?;
    let tensor = CudaView::into_tensor;
    Ok((outputs.hidden.map(tensor), outputs.weight.map(tensor), outputs.bias.map(tensor)))
}

/// The gradients that were asked for, and the scratch of the weight's.
struct Outputs<'py> {
    hidden: Option<CudaView<'py>>,
    weight: Option<CudaView<'py>>,
    bias: Option<CudaView<'py>>,
    partials: Option<CudaView<'py>>,
}

impl<'py> Outputs<'py> {
    fn new(arguments: &Arguments<'py>, needed: [bool; 3]) -> PyResult<Self> {
        let Arguments { hidden, weight, rows, shapes, .. } = arguments;
        let scratch = i64::try_from(partials(rows, u32::try_from(shapes.outputs)?))?;
        let output =
            |needed: bool, name, sizes: &[i64], dtype| needed.then(|| hidden.new_empty(name, sizes, dtype)).transpose();
        Ok(Self {
            hidden: output(needed[0], "grad_hidden", hidden.sizes(), hidden.dtype())?,
            weight: output(needed[1], "grad_weight", weight.sizes(), Dtype::Float32)?,
            bias: output(needed[2], "grad_bias", &[shapes.outputs as i64], Dtype::Float32)?,
            partials: output(needed[1], "partials", &[scratch], Dtype::Float32)?,
        })
    }

    fn addresses(&self) -> DeviceGradients {
        let address = CudaView::address;
        let weight = self.weight.as_ref().zip(self.partials.as_ref());
        DeviceGradients {
            hidden: self.hidden.as_ref().map(address),
            weight: weight.map(|(to, scratch)| WeightGradient { address: address(to), partials: address(scratch) }),
            bias: self.bias.as_ref().map(address),
        }
    }
}
