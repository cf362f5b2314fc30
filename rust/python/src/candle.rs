//! `CandleValueHead`: the candle crate's head for arrays that are already in memory, without torch.
//!
//! The candle head loads, holds and saves the weights. Hidden states never become a candle tensor, whose storage owns its
//! memory, so that this would copy them: the head's kernels read them where the array's library keeps them.
use crate::gate;
use array::{ArrayView, Output};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyType;
use std::path::PathBuf;
use std::sync::Arc;
use vhead_candle::candle_core::{CpuStorage, Device, Storage, Tensor};
use vhead_candle::{Error, ValueHead};
use vhead_core::{Element, threads::Pool, with_element};

mod array;

pyo3::import_exception!(vhead.errors, HeadFileError);
pyo3::import_exception!(vhead.errors, HeadMismatchError);

/// A value head without torch: hidden states [..., H] to float32 values [...], or [..., K] where K > 1.
///
/// The weights lie in candle tensors, the hidden states wherever their library keeps them: nothing is copied. A row's value
/// is the one that `vhead.ops.value_head` gives, bit for bit.
///
/// Args:
///     weight: [K, H] or [H], float32, bfloat16 or float16 (widened to float32, exactly): a numpy array or a DLPack tensor.
///     bias: [K], likewise.
///     device: "cpu": the candle of this wheel is built without CUDA.
///     num_threads: Threads for large inputs; VHEAD_NUM_THREADS, else the cores that this process may use.
///
/// Raises:
///     TypeError: No array, or another dtype.
///     ValueError: Another shape, another device, memory that cannot be there, or threads that no machine runs.
///     AllocationError: A broadcast weight or bias has more elements than memory.
#[pyclass(frozen, module = "vhead._native", name = "CandleValueHead")]
#[derive(Debug)]
pub(crate) struct CandleValueHead {
    head: ValueHead,
    num_threads: Option<usize>,
}

#[pymethods]
impl CandleValueHead {
    #[new]
    #[pyo3(signature = (weight, bias = None, device = "cpu", num_threads = None))]
    fn new(
        weight: &Bound<'_, PyAny>,
        bias: Option<&Bound<'_, PyAny>>,
        device: &str,
        num_threads: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (py, device, num_threads) = (weight.py(), parse_device(device)?, parse_threads(num_threads)?);
        let weight = ArrayView::new("weight", weight)?;
        let (outputs, columns) = match *weight.sizes() {
            [columns] => (1, columns),
            [outputs, columns] => (outputs, columns),
            ref sizes => return Err(wrong_shape("weight", "[K, H] or [H]", sizes)),
        };
        let weight = Tensor::from_vec(weight.floats()?, (outputs, columns), &device).map_err(candle_error)?;
        let bias = bias.map(|bias| ArrayView::new("bias", bias)).transpose()?;
        let to_tensor =
            |bias: ArrayView<'_>| Tensor::from_vec(bias.floats()?, bias.sizes(), &device).map_err(candle_error);
        let bias = bias.map(to_tensor).transpose()?;
        Self::with_threads(py, ValueHead::new(weight, bias).map_err(to_python)?, num_threads)
    }

    /// The head in a safetensors file, which is memory-mapped: a whole language model may lie beside the head.
    ///
    /// Takes v_head.summary.weight and .bias (a model with a value head), summary.* (a value head alone), or weight and
    /// perhaps bias (a linear layer alone), float32, bfloat16 or float16.
    ///
    /// Raises:
    ///     OSError: The file cannot be read; FileNotFoundError where there is none.
    ///     HeadFileError: It is no whole safetensors file.
    ///     AllocationError: There is no memory for the head that it holds.
    ///     HeadMismatchError: It holds no head, half a head, several heads, or one that does not fit together; or its
    ///         metadata, or the config.json beside a model's file, says that the head is distributional or a classifier,
    ///         whose outputs are no values.
    #[classmethod]
    #[pyo3(signature = (path, device = "cpu", *, num_threads = None))]
    fn load(
        kind: &Bound<'_, PyType>,
        path: PathBuf,
        device: &str,
        num_threads: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (device, num_threads) = (parse_device(device)?, parse_threads(num_threads)?);
        let head = gate::run(kind.py(), usize::MAX, || Ok(ValueHead::load(path, &device)))?;
        Self::with_threads(kind.py(), head.map_err(to_python)?, num_threads)
    }

    /// Writes v_head.summary.weight and .bias the way safetensors.torch does, beside `path`, and renames.
    ///
    /// In that format a head has a bias: one without it is saved with zeros, which changes no value.
    ///
    /// Raises:
    ///     OSError: The file cannot be written; what was there before is untouched.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        gate::run(py, usize::MAX, || Ok(self.head.save(path)))?.map_err(to_python)
    }

    /// The value of each row of hidden states [..., H], as a new float32 numpy array [...], or [..., K] where K > 1.
    ///
    /// Takes numpy arrays and whatever has `__dlpack__` on the CPU: float32, float16 or bfloat16, read-only or not, any
    /// strides; only a last dimension that is not contiguous is copied. NaN and infinities reach the values.
    ///
    /// Raises:
    ///     TypeError: No array, or another dtype.
    ///     ValueError: The last dimension is not H, the array is on another device, or no array can be where it says it is.
    ///     BufferError: Its library refuses to export it, as torch does for tensors that require grad.
    fn __call__<'py>(&self, hidden: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let hidden = ArrayView::new("hidden", hidden)?;
        if hidden.sizes().last() != Some(&self.head.in_features()) {
            return Err(wrong_shape("hidden", &format!("[..., {}]", self.head.in_features()), hidden.sizes()));
        }
        with_element!(hidden.dtype(), T => self.values::<T>(&hidden))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyType>, Parts<'py>)> {
        let this = slf.get();
        let parts = (this.weight(slf.py())?, this.bias(slf.py())?, this.device(), this.num_threads);
        Ok((slf.get_type(), parts))
    }

    fn __repr__(&self) -> String {
        format!(
            "CandleValueHead(in_features={}, out_features={}, bias={}, device='{}')",
            self.in_features(),
            self.out_features(),
            if self.head.bias().is_some() { "True" } else { "False" },
            self.device()
        )
    }

    /// Elements in a row of hidden states: H.
    #[getter]
    fn in_features(&self) -> usize {
        self.head.in_features()
    }

    /// Numbers a row: K, 1 for a critic.
    #[getter]
    fn out_features(&self) -> usize {
        self.head.out_features()
    }

    /// Where the weights are: "cpu".
    #[getter]
    fn device(&self) -> &'static str {
        CPU
    }

    /// A copy of the weight, float32 [K, H].
    #[getter]
    fn weight<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_numpy(py, self.head.weight())
    }

    /// A copy of the bias, float32 [K]; None without one.
    #[getter]
    fn bias<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.head.bias().map(|bias| to_numpy(py, bias)).transpose()
    }
}

const CPU: &str = "cpu";
/// What the constructor takes.
type Parts<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, &'static str, Option<usize>);

impl CandleValueHead {
    /// `num_threads`, else `VHEAD_NUM_THREADS`, else the cores that this process may use.
    fn with_threads(py: Python<'_>, head: ValueHead, num_threads: Option<usize>) -> PyResult<Self> {
        let threads = match num_threads {
            Some(threads) => Some(threads),
            None => py.import("vhead.env")?.call_method0("read_settings")?.getattr("num_threads")?.extract()?,
        };
        let head = match threads {
            Some(threads) => head.with_executor(Arc::new(Pool::new(threads))),
            None => head,
        };
        Ok(Self { head, num_threads })
    }

    fn values<'py, T: Element>(&self, hidden: &ArrayView<'py>) -> PyResult<Bound<'py, PyAny>> {
        let py = hidden.py();
        let mut sizes = hidden.sizes().to_vec();
        sizes.pop();
        sizes.extend((self.out_features() > 1).then_some(self.out_features()));
        let mut output = Output::new(py, &sizes)?;
        let mut copy = Vec::new();
        let (rows, values) = (hidden.rows::<T>(&mut copy)?, output.elements());
        let elements = rows.count().saturating_mul(self.in_features()).saturating_mul(self.out_features());
        gate::run(py, elements, || Ok(self.head.forward_rows(&rows, values)))?.map_err(to_python)?;
        Ok(output.into_array())
    }
}

/// # Errors
/// `ValueError` for a number of threads that no machine runs, `TypeError` for what is no number.
fn parse_threads(num_threads: Option<Bound<'_, PyAny>>) -> PyResult<Option<usize>> {
    let Some(given) = num_threads else { return Ok(None) };
    match given.extract::<usize>() {
        Ok(threads) if (1..=Pool::MOST_THREADS).contains(&threads) => Ok(Some(threads)),
        Err(error) if error.is_instance_of::<PyTypeError>(given.py()) => Err(error),
        _ => {
            let most = Pool::MOST_THREADS;
            Err(PyValueError::new_err(format!("num_threads: expected 1 to {most}, got {}", given.str()?)))
        }
    }
}

fn parse_device(device: &str) -> PyResult<Device> {
    if device == CPU {
        return Ok(Device::Cpu);
    }
    let reason = if names_cuda(device) {
        ": the candle of this wheel is built without CUDA. Use vhead.ops.value_head for torch tensors on a CUDA device, or \
         the Rust crate vhead-candle with its feature `cuda`"
    } else {
        ""
    };
    Err(PyValueError::new_err(format!("device: expected 'cpu', got '{device}'{reason}")))
}

/// Whether this is "cuda", or "cuda:" and a number.
fn names_cuda(device: &str) -> bool {
    let Some(rest) = device.strip_prefix("cuda") else { return false };
    rest.is_empty() || rest.strip_prefix(':').is_some_and(|ordinal| ordinal.parse::<u32>().is_ok())
}

fn to_numpy<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    let mut output = Output::new(py, tensor.dims())?;
    let (storage, layout) = tensor.storage_and_layout();
    let numbers = match &*storage {
        Storage::Cpu(CpuStorage::F32(numbers)) => numbers.get(layout.start_offset()..).unwrap_or_default(),
        _ => &[],
    };
    output.elements().iter_mut().zip(numbers).for_each(|(to, number)| *to = *number);
    Ok(output.into_array())
}

fn wrong_shape(name: &str, expected: &str, actual: &[usize]) -> PyErr {
    PyValueError::new_err(format!("{name}: expected shape {expected}, got {actual:?}"))
}

fn candle_error(error: vhead_candle::candle_core::Error) -> PyErr {
    to_python(error.into())
}

/// The Python exception for an error of the candle crate.
fn to_python(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::File { path, source } => match *source {
            Error::Io(error) => match error.raw_os_error() {
                // Python chooses FileNotFoundError and its like by the number.
                Some(number) => PyOSError::new_err((number, os_message(&error), path)),
                None => PyOSError::new_err(text),
            },
            source => to_python_with(source, text),
        },
        error => to_python_with(error, text),
    }
}

fn to_python_with(error: Error, text: String) -> PyErr {
    match error {
        Error::Format(_) | Error::Header { .. } => HeadFileError::new_err(text),
        Error::Keys { .. } | Error::Settings { .. } | Error::Tensor { .. } => HeadMismatchError::new_err(text),
        Error::Dtype { .. } => PyTypeError::new_err(text),
        Error::Shape { .. } | Error::Strides { .. } | Error::Device { .. } => PyValueError::new_err(text),
        Error::Kernel(error) => gate::saying(&error, text),
        Error::Io(error) => error.into(),
        _ => PyRuntimeError::new_err(text),
    }
}

/// "No such file or directory", without the number that Rust adds and Python adds again.
fn os_message(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}
