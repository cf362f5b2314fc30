//! What is asked of the running torch once: its types, its dtypes, how it lends tensors.
use crate::dlpack::{self, Exchange};
use crate::dtype::Scalar;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use std::sync::atomic::{AtomicBool, Ordering};

/// One of torch's dtype objects.
#[derive(Debug)]
struct TorchDtype {
    scalar: Scalar,
    object: Py<PyAny>,
    /// `dtype` and `device` for `torch.empty`. The device is said, since a default device (`with torch.device("meta")`)
    /// must not reach a kernel's output.
    keywords: Py<PyDict>,
    /// `dtype` for `Tensor.new_empty`.
    only_dtype: Py<PyDict>,
}

impl TorchDtype {
    fn read(torch: &Bound<'_, PyModule>, scalar: Scalar) -> PyResult<Self> {
        let (object, keywords) = (torch.getattr(scalar.name())?, PyDict::new(torch.py()));
        keywords.set_item("dtype", &object)?;
        let only_dtype = keywords.copy()?;
        keywords.set_item("device", torch.getattr("device")?.call1(("cpu",))?)?;
        Ok(Self { scalar, object: object.unbind(), keywords: keywords.unbind(), only_dtype: only_dtype.unbind() })
    }
}

/// The running torch.
#[derive(Debug)]
pub(crate) struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    exchange: Option<Exchange>,
    dtypes: Vec<TorchDtype>,
    strided: Py<PyAny>,
    default_dispatch: Py<PyAny>,
    empty: Py<PyAny>,
    get_num_threads: Py<PyAny>,
    /// Takes a device's number and gives its current stream's handle; older releases have it under its public name only.
    current_raw_stream: Option<Py<PyAny>>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
static READ_ATTRIBUTES: AtomicBool = AtomicBool::new(false);

/// Reads tensors by their attributes even where torch offers DLPack's table.
pub(crate) fn read_attributes(yes: bool) {
    READ_ATTRIBUTES.store(yes, Ordering::Relaxed);
}

impl Torch {
    /// The running torch, imported where it is not yet.
    pub(crate) fn get(py: Python<'_>) -> PyResult<&Self> {
        TORCH.get_or_try_init(py, || Self::read(py))
    }

    fn read(py: Python<'_>) -> PyResult<Self> {
        let torch = py.import("torch")?;
        let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
        let parameter = torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?;
        Ok(Self {
            exchange: Exchange::of(&tensor),
            default_dispatch: tensor.getattr("__torch_dispatch__")?.unbind(),
            tensor: tensor.unbind(),
            parameter: parameter.unbind(),
            dtypes: Scalar::ALL.into_iter().map(|scalar| TorchDtype::read(&torch, scalar)).collect::<PyResult<_>>()?,
            strided: torch.getattr("strided")?.unbind(),
            empty: torch.getattr("empty")?.unbind(),
            get_num_threads: torch.getattr("get_num_threads")?.unbind(),
            current_raw_stream: torch.getattr("_C")?.getattr("_cuda_getCurrentRawStream").ok().map(Bound::unbind),
        })
    }

    /// DLPack's table, where torch has one and the settings allow it.
    pub(crate) fn exchange(&self) -> Option<&Exchange> {
        self.exchange.as_ref().filter(|_| !READ_ATTRIBUTES.load(Ordering::Relaxed))
    }

    /// Whether `object` is exactly a `torch.Tensor` or a `torch.nn.Parameter`.
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let kind = object.get_type_ptr();
        [&self.tensor, &self.parameter].into_iter().any(|plain| plain.as_ptr() == kind.cast())
    }

    /// Whether `object` is a tensor whose data is its own: no subclass that intercepts operations (fake tensors,
    /// `DTensor`), whose storage is somewhere else or nowhere.
    pub(crate) fn holds_data(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        if self.is_plain(object) {
            return Ok(true);
        }
        let dispatch = object.get_type().getattr("__torch_dispatch__")?;
        Ok(dispatch.is(self.default_dispatch.bind(object.py())))
    }

    /// Whether `object` is a tensor of any kind.
    pub(crate) fn is_tensor(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        object.is_instance(self.tensor.bind(object.py()))
    }

    /// Whether `layout` is `torch.strided`.
    pub(crate) fn is_strided(&self, layout: &Bound<'_, PyAny>) -> bool {
        layout.is(self.strided.bind(layout.py()))
    }

    /// Which of our dtypes the torch dtype `object` is.
    pub(crate) fn dtype(&self, object: &Bound<'_, PyAny>) -> Option<Scalar> {
        let known = self.dtypes.iter().find(|known| object.is(known.object.bind(object.py())))?;
        Some(known.scalar)
    }

    /// A new contiguous CPU tensor, not initialised, from torch's own allocator.
    pub(crate) fn empty<'py>(&self, py: Python<'py>, sizes: &[i64], scalar: Scalar) -> PyResult<Bound<'py, PyAny>> {
        let known = self.dtypes.iter().find(|known| known.scalar == scalar);
        let keywords = known.map(|known| known.keywords.bind(py));
        self.empty.bind(py).call((PyTuple::new(py, sizes)?,), keywords)
    }

    /// A new contiguous tensor, not initialised, from torch's own allocator, on the device of `tensor`.
    pub(crate) fn new_empty<'py>(
        &self,
        tensor: &Bound<'py, PyAny>,
        sizes: &[i64],
        scalar: Scalar,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = tensor.py();
        let known = self.dtypes.iter().find(|known| known.scalar == scalar);
        let keywords = known.map(|known| known.only_dtype.bind(py));
        tensor.call_method(intern!(py, "new_empty"), (PyTuple::new(py, sizes)?,), keywords)
    }

    /// The stream that torch sends its work on `device` to now, as the driver numbers it.
    pub(crate) fn current_stream(&self, py: Python<'_>, device: dlpack::Device) -> PyResult<usize> {
        if let Some(exchange) = self.exchange() {
            return exchange.current_stream(py, device);
        }
        match &self.current_raw_stream {
            Some(function) => function.bind(py).call1((device.index,))?.extract(),
            None => {
                let stream = py.import("torch.cuda")?.call_method1("current_stream", (device.index,))?;
                stream.getattr("cuda_stream")?.extract()
            }
        }
    }

    /// `torch.get_num_threads()`.
    pub(crate) fn num_threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.get_num_threads.bind(py).call0()?.extract()
    }
}
