//! Token statistics of CUDA tensors: the classes of [`crate::statistics`] with their kernels on the device.
use super::CudaView;
use crate::description::unsigned;
use crate::gate;
use crate::torch::Dtype;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhead_core::LogitsRule;
use vhead_cuda::{Device, DeviceLogits, DeviceRowGradients, DeviceStatistics, ROW_STATE_BYTES};

/// `[N]` targets, and the biases of the vocabulary's tokens: what every tile is cut from.
struct Vocabulary {
    targets: Py<PyAny>,
    bias: Option<Py<PyAny>>,
    rows: u64,
    size: u64,
    rule: LogitsRule,
}

impl Vocabulary {
    /// The targets are not read here, since that would wait for the device.
    fn new(targets: &Bound<'_, PyAny>, size: u64, bias: Option<&Bound<'_, PyAny>>, rule: LogitsRule) -> PyResult<Self> {
        let targets = CudaView::new("targets", targets, &[Dtype::Int64])?.contiguous()?;
        let bias = bias.map(|bias| targets.beside("bias", bias, &Dtype::FLOATS)?.floats()).transpose()?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.count() as u64 != size) {
            return Err(wrong_length("bias", size, bias.count() as u64));
        }
        let rows = targets.count() as u64;
        let bias = bias.map(|bias| bias.into_tensor().unbind());
        Ok(Self { targets: targets.into_tensor().unbind(), bias, rows, size, rule })
    }

    fn targets<'py>(&self, py: Python<'py>) -> PyResult<CudaView<'py>> {
        CudaView::new("targets", self.targets.bind(py), &[Dtype::Int64])
    }

    /// The tile of `products` that starts at `row` and `column`.
    fn tile<'py>(
        &self,
        products: &Bound<'py, PyAny>,
        row: u64,
        column: u64,
    ) -> PyResult<(CudaView<'py>, DeviceLogits)> {
        let py = products.py();
        let products = self.targets(py)?.beside("products", products, &[Dtype::Float32])?.with_contiguous_rows()?;
        let &[rows, columns] = products.sizes() else {
            return Err(PyValueError::new_err(format!("products: expected [n, v], got {:?}", products.sizes())));
        };
        let (rows, columns) = (unsigned(rows) as u64, unsigned(columns) as u64);
        for (what, count, room) in
            [("rows", rows, self.rows.saturating_sub(row)), ("columns", columns, self.size.saturating_sub(column))]
        {
            if count > room {
                return Err(wrong_length(what, room, count));
            }
        }
        let bias = match &self.bias {
            Some(bias) => CudaView::new("bias", bias.bind(py), &[Dtype::Float32])?.address() + column * 4,
            None => 0,
        };
        let row_stride = unsigned(products.strides().first().copied().unwrap_or(0)) as u64;
        let products_at = products.address();
        let tile = DeviceLogits {
            products: products_at,
            row_stride,
            rows,
            columns,
            first_column: column,
            bias,
            rule: self.rule,
        };
        Ok((products, tile))
    }
}

fn wrong_length(what: &'static str, expected: u64, actual: u64) -> PyErr {
    PyValueError::new_err(format!("{what}: expected {expected} elements, got {actual}"))
}

/// Statistics of `[N]` targets, a tile of products at a time, on the targets' device and torch's current stream.
#[pyclass(module = "vhead._native", frozen)]
pub(crate) struct CudaLogitStatistics {
    of: Vocabulary,
    states: Py<PyAny>,
}

#[pymethods]
impl CudaLogitStatistics {
    #[new]
    #[pyo3(signature = (targets, vocabulary, bias, scale, softcap, temperature))]
    fn new(
        targets: &Bound<'_, PyAny>,
        vocabulary: u64,
        bias: Option<&Bound<'_, PyAny>>,
        scale: f64,
        softcap: Option<f64>,
        temperature: f64,
    ) -> PyResult<Self> {
        let of = Vocabulary::new(targets, vocabulary, bias, LogitsRule::new(scale, softcap, temperature))?;
        let sizes = [i64::try_from(of.rows)?, (ROW_STATE_BYTES / 8).cast_signed()];
        let states = of.targets(targets.py())?.new_empty("states", &sizes, Dtype::Int64)?;
        Ok(Self { of, states: states.into_tensor().unbind() })
    }

    /// Adds float32 products `[n, v]` of the rows from `row` on with the tokens from `column` on; each row's columns come in
    /// rising order, from 0 on.
    fn fold(&self, products: &Bound<'_, PyAny>, row: u64, column: u64) -> PyResult<()> {
        let py = products.py();
        let (products, tile) = self.of.tile(products, row, column)?;
        let targets = self.of.targets(py)?.address() + row * 8;
        let states = self.states(py)?.address() + row * ROW_STATE_BYTES;
        let (ordinal, stream) = (products.ordinal(), products.stream()?);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: the tile's rows and columns are inside the targets, states and biases, as has been checked, and torch
            // promises that a tensor's sizes and strides stay inside its memory; it orders other work by the stream.
            unsafe { device.fold_logits(stream, &tile, targets, states) }
        })
    }

    /// As [`crate::statistics::LogitStatistics::finish`]; the log-probability of a target that no tile held is NaN.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let states = self.states(py)?;
        let sizes = [i64::try_from(self.of.rows)?];
        let new_output = || states.new_empty("statistics", &sizes, Dtype::Float32);
        let outputs = [new_output()?, new_output()?, new_output()?, new_output()?, new_output()?, new_output()?];
        let [logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum] = outputs.each_ref().map(CudaView::address);
        let to = DeviceStatistics { logprobs, entropy, log_sum_p_squared, is_top1, peak, log_sum };
        let (ordinal, stream, from, rows) = (states.ordinal(), states.stream()?, states.address(), self.of.rows);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: there are as many states and numbers of each output as rows; the rest as in `fold`.
            unsafe { device.finish_statistics(stream, from, rows, to) }
        })?;
        Ok(outputs.into_iter().map(CudaView::into_tensor).collect())
    }
}

impl CudaLogitStatistics {
    fn states<'py>(&self, py: Python<'py>) -> PyResult<CudaView<'py>> {
        CudaView::new("states", self.states.bind(py), &[Dtype::Int64])
    }
}

/// Gradients of log-probabilities and entropies by the products, a tile at a time, on the targets' device.
#[pyclass(module = "vhead._native", frozen)]
pub(crate) struct CudaLogitGradients {
    of: Vocabulary,
    /// Peak, `log_sum`, entropy, and the gradients of log-probabilities and entropies.
    numbers: [Py<PyAny>; 5],
}

const NUMBERS: [&str; 5] = ["peak", "log_sum", "entropy", "grad_logprobs", "grad_entropy"];

#[pymethods]
impl CudaLogitGradients {
    #[new]
    #[pyo3(signature = (targets, vocabulary, bias, scale, softcap, temperature, statistics, gradients))]
    #[expect(clippy::too_many_arguments, reason = "those of the statistics, and two lists")]
    fn new(
        targets: &Bound<'_, PyAny>,
        vocabulary: u64,
        bias: Option<&Bound<'_, PyAny>>,
        scale: f64,
        softcap: Option<f64>,
        temperature: f64,
        statistics: [Bound<'_, PyAny>; 3],
        gradients: [Bound<'_, PyAny>; 2],
    ) -> PyResult<Self> {
        let of = Vocabulary::new(targets, vocabulary, bias, LogitsRule::new(scale, softcap, temperature))?;
        let targets = of.targets(targets.py())?;
        let mut numbers = Vec::with_capacity(NUMBERS.len());
        for (name, tensor) in NUMBERS.into_iter().zip(statistics.iter().chain(&gradients)) {
            let view = targets.beside(name, tensor, &[Dtype::Float32])?.contiguous()?;
            if view.count() as u64 != of.rows {
                return Err(wrong_length(name, of.rows, view.count() as u64));
            }
            numbers.push(view.into_tensor().unbind());
        }
        let numbers = numbers.try_into().map_err(|_| PyValueError::new_err("expected five tensors of numbers"))?;
        Ok(Self { of, numbers })
    }

    /// Writes the gradients of float32 products `[n, v]` to `out`, contiguous and of the same sizes, float32, bfloat16 or
    /// float16; `out` may be the products themselves, where those are contiguous.
    fn differentiate(
        &self,
        products: &Bound<'_, PyAny>,
        row: u64,
        column: u64,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let py = products.py();
        let (products, tile) = self.of.tile(products, row, column)?;
        let out = products.beside("out", out, &Dtype::FLOATS)?;
        if out.sizes() != products.sizes() || !out.is_contiguous() {
            let (expected, actual) = (products.sizes(), out.sizes());
            return Err(PyValueError::new_err(format!("out: expected contiguous {expected:?}, got {actual:?}")));
        }
        let (address, dtype) = (out.address(), out.device_dtype());
        let rows = self.rows(py, row)?;
        let (ordinal, stream) = (products.ordinal(), products.stream()?);
        gate::launch(py, || {
            let device = Device::get(ordinal)?;
            // SAFETY: as in `CudaLogitStatistics::fold`; `out` has as many elements as the tile.
            unsafe { device.differentiate_logits(stream, &tile, &rows, dtype, address) }
        })
    }
}

impl CudaLogitGradients {
    /// The numbers of the rows from `row` on.
    fn rows(&self, py: Python<'_>, row: u64) -> PyResult<DeviceRowGradients> {
        let mut addresses = [0; 5];
        for ((address, name), tensor) in addresses.iter_mut().zip(NUMBERS).zip(&self.numbers) {
            *address = CudaView::new(name, tensor.bind(py), &[Dtype::Float32])?.address() + row * 4;
        }
        let [peak, log_sum, entropy, grad_logprobs, grad_entropy] = addresses;
        let targets = self.of.targets(py)?.address() + row * 8;
        Ok(DeviceRowGradients { targets, peak, log_sum, entropy, grad_logprobs, grad_entropy })
    }
}
