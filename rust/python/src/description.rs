//! What torch says about a tensor: dtype, sizes, strides, address and device, checked once.
use crate::dlpack::{self, Device};
use crate::dtype::{Kind, Scalar};
use crate::torch::Torch;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

/// Where a tensor's memory must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Cpu,
    Cuda,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// The tests' emulated driver shares this process's memory, so that CPU tensors are on its device 0.
    fn holds(self, device: Device) -> bool {
        match self {
            Self::Cpu => device.kind == dlpack::CPU,
            Self::Cuda => device.kind == dlpack::CUDA || (device.kind == dlpack::CPU && vhead_cuda::is_emulated()),
        }
    }
}

/// A description of a tensor of one kind, which it keeps alive.
#[derive(Debug)]
pub(crate) struct Description<'py, K> {
    pub(crate) name: &'static str,
    pub(crate) owner: Bound<'py, PyAny>,
    pub(crate) data: *const u8,
    pub(crate) kind: K,
    pub(crate) device: Device,
    /// Sizes, then strides in elements.
    layout: Vec<i64>,
}

impl<'py, K: Kind> Description<'py, K> {
    /// Describes `tensor`, which errors call `name`.
    ///
    /// # Errors
    /// `TypeError` for what is no tensor, a tensor subclass with data of its own kind, or another dtype; `ValueError` for
    /// another device, another layout, or a negative view (whose memory holds the values negated).
    pub(crate) fn new(name: &'static str, tensor: &Bound<'py, PyAny>, place: Place) -> PyResult<Self> {
        let torch = Torch::get(tensor.py())?;
        check_kind(name, tensor, torch)?;
        let described = match torch.exchange() {
            Some(exchange) => match exchange.view(tensor) {
                Ok(view) => Self::from_dlpack(name, tensor, &view, place)?,
                Err(error) => return Err(no_storage(name, tensor, place, error)),
            },
            None => Self::from_attributes(name, tensor, torch, place)?,
        };
        if described.data.is_null() && described.count() > 0 {
            return Err(PyValueError::new_err(format!("{name}: expected a tensor with storage, got one without")));
        }
        Ok(described)
    }

    fn from_dlpack(
        name: &'static str,
        tensor: &Bound<'py, PyAny>,
        view: &dlpack::Tensor,
        place: Place,
    ) -> PyResult<Self> {
        if !place.holds(view.device) {
            return Err(wrong_device(name, tensor, place)?);
        }
        let Some(kind) = Scalar::from_dlpack(view.dtype).and_then(K::of) else {
            return Err(wrong_dtype(name, tensor, K::EXPECTED)?);
        };
        let dimensions = usize::try_from(view.dimensions)?;
        let mut layout = Vec::with_capacity(2 * dimensions);
        for pointer in [view.sizes, view.strides].into_iter().filter(|_| dimensions > 0) {
            // SAFETY: DLPack promises `dimensions` sizes and as many strides while the tensor lives; torch gives both.
            layout.extend_from_slice(unsafe { std::slice::from_raw_parts(pointer, dimensions) });
        }
        let data = view.data.cast_const().cast::<u8>().wrapping_add(usize::try_from(view.byte_offset)?);
        Ok(Self { name, owner: tensor.clone(), data, kind, device: view.device, layout })
    }

    fn from_attributes(name: &'static str, tensor: &Bound<'py, PyAny>, torch: &Torch, place: Place) -> PyResult<Self> {
        let py = tensor.py();
        let device = match device(tensor)? {
            Some(device) if place.holds(device) => device,
            _ => return Err(wrong_device(name, tensor, place)?),
        };
        let Some(kind) = torch.dtype(&tensor.getattr(intern!(py, "dtype"))?).and_then(K::of) else {
            return Err(wrong_dtype(name, tensor, K::EXPECTED)?);
        };
        if !torch.is_strided(&tensor.getattr(intern!(py, "layout"))?) {
            return Err(wrong_layout(name, tensor)?);
        }
        let mut layout: Vec<i64> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        layout.extend(tensor.call_method0(intern!(py, "stride"))?.extract::<Vec<i64>>()?);
        let address: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let data = std::ptr::with_exposed_provenance(address);
        Ok(Self { name, owner: tensor.clone(), data, kind, device, layout })
    }

    /// The same tensor as one of another kind, which the caller knows it to be.
    pub(crate) fn with_kind<L>(self, kind: L) -> Description<'py, L> {
        let Self { name, owner, data, kind: _, device, layout } = self;
        Description { name, owner, data, kind, device, layout }
    }

    /// Size of each dimension.
    pub(crate) fn sizes(&self) -> &[i64] {
        self.layout.split_at(self.layout.len() / 2).0
    }

    /// Elements between neighbours in each dimension.
    pub(crate) fn strides(&self) -> &[i64] {
        self.layout.split_at(self.layout.len() / 2).1
    }

    /// Number of elements.
    pub(crate) fn count(&self) -> usize {
        self.sizes().iter().map(|&size| unsigned(size)).product()
    }

    /// Size of the last dimension; 1 for a scalar.
    pub(crate) fn columns(&self) -> usize {
        self.sizes().last().map_or(1, |&size| unsigned(size))
    }

    /// Whether the elements of a row are neighbours.
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.columns() <= 1 || self.strides().last() == Some(&1)
    }

    /// Whether the elements lie in one row-major piece.
    pub(crate) fn is_contiguous(&self) -> bool {
        let sizes = self.sizes().iter().zip(self.strides()).rev();
        let end = sizes
            .into_iter()
            .try_fold(1, |expected, (&size, &stride)| (size == 1 || stride == expected).then_some(expected * size));
        end.is_some() || self.count() == 0
    }
}

/// torch's sizes are never negative.
pub(crate) fn unsigned(size: i64) -> usize {
    usize::try_from(size).unwrap_or(0)
}

/// The device of a tensor by its attributes; `None` where it is neither a CPU nor a CUDA device.
fn device(tensor: &Bound<'_, PyAny>) -> PyResult<Option<Device>> {
    let py = tensor.py();
    if tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
        return Ok(Some(Device { kind: dlpack::CPU, index: 0 }));
    }
    if tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
        let index = tensor.call_method0(intern!(py, "get_device"))?.extract()?;
        return Ok(Some(Device { kind: dlpack::CUDA, index }));
    }
    Ok(None)
}

fn check_kind(name: &str, tensor: &Bound<'_, PyAny>, torch: &Torch) -> PyResult<()> {
    let py = tensor.py();
    if !torch.is_plain(tensor) {
        let got = tensor.get_type().qualname()?;
        if !torch.is_tensor(tensor)? {
            return Err(PyTypeError::new_err(format!("{name}: expected a torch.Tensor, got {got}")));
        }
        if !torch.holds_data(tensor)? {
            return Err(PyTypeError::new_err(format!("{name}: expected a tensor with its own data, got a {got}")));
        }
    }
    if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
        return Err(PyValueError::new_err(format!(
            "{name}: expected a tensor as it lies in memory, got a negative view (call resolve_neg())"
        )));
    }
    Ok(())
}

fn wrong_device(name: &str, tensor: &Bound<'_, PyAny>, place: Place) -> PyResult<PyErr> {
    let device = tensor.getattr("device")?.str()?;
    Ok(PyValueError::new_err(format!("{name}: expected a tensor on {}, got one on {device}", place.name())))
}

fn wrong_dtype(name: &str, tensor: &Bound<'_, PyAny>, expected: &[Scalar]) -> PyResult<PyErr> {
    let names: Vec<&str> = expected.iter().map(|scalar| scalar.name()).collect();
    let actual = tensor.getattr("dtype")?.str()?.to_string();
    let actual = actual.trim_start_matches("torch.");
    Ok(PyTypeError::new_err(format!("{name}: expected {}, got {actual}", names.join(" or "))))
}

fn wrong_layout(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    let layout = tensor.getattr("layout")?.str()?;
    Ok(PyValueError::new_err(format!("{name}: expected a dense tensor, got layout {layout}")))
}

/// Says why DLPack could not view the tensor, in the words that the other way of reading uses.
fn no_storage(name: &str, tensor: &Bound<'_, PyAny>, place: Place, cause: PyErr) -> PyErr {
    let py = tensor.py();
    let error = match device(tensor) {
        Ok(Some(device)) if place.holds(device) => wrong_layout(name, tensor),
        Ok(_) => wrong_device(name, tensor, place),
        Err(error) => Err(error),
    };
    let error = error.unwrap_or_else(|error| error);
    error.set_cause(py, Some(cause));
    error
}
