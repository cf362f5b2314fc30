//! A checked view of a CUDA tensor: an address that is handed to a kernel and never read here.
use crate::description::{Description, Place, unsigned};
use crate::dlpack;
use crate::dtype::{Float32, Kind};
use crate::gate;
use crate::torch::Torch;
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use vhead_core::Dtype;
use vhead_cuda::{DeviceRows, Stream};

/// A tensor of one kind in the memory of a CUDA device, which this view keeps alive.
///
/// The memory of a tensor that torch makes for a launch may be given back before the launch has run: torch's allocator
/// orders its reuse on the same stream.
#[derive(Debug)]
pub(crate) struct CudaView<'py, K = Dtype>(Description<'py, K>);

impl<'py, K: Kind> CudaView<'py, K> {
    /// A view of `tensor`, which errors call `name`.
    ///
    /// # Errors
    /// As [`Description::new`].
    pub(crate) fn new(name: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<Self> {
        Description::new(name, tensor, Place::Cuda).map(Self)
    }

    /// A view of another tensor of a call: it must be on this one's device.
    ///
    /// # Errors
    /// As [`CudaView::new`], and `ValueError` for another CUDA device.
    pub(crate) fn beside<L: Kind>(&self, name: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<CudaView<'py, L>> {
        let view = CudaView::<L>::new(name, tensor)?;
        if view.0.device != self.0.device {
            return Err(PyValueError::new_err(format!(
                "{name}: expected a tensor on cuda:{} like {}, got one on cuda:{}",
                self.ordinal(),
                self.0.name,
                view.ordinal()
            )));
        }
        Ok(view)
    }

    /// An empty tensor on this one's device, contiguous and not initialised.
    ///
    /// # Errors
    /// What torch raises when it cannot allocate.
    pub(crate) fn new_empty<L: Kind>(&self, name: &'static str, sizes: &[i64], kind: L) -> PyResult<CudaView<'py, L>> {
        let tensor = Torch::get(self.0.owner.py())?.new_empty(&self.0.owner, sizes, kind.scalar())?;
        self.beside(name, &tensor)
    }

    /// The device's number.
    pub(crate) fn ordinal(&self) -> i32 {
        // CPU tensors are on device 0 of the emulated driver.
        if self.0.device.kind == dlpack::CUDA { self.0.device.index } else { 0 }
    }

    /// The stream that torch sends its work on this device to now.
    pub(crate) fn stream(&self) -> PyResult<Stream> {
        let py = self.0.owner.py();
        Torch::get(py)?.current_stream(py, self.0.device).map(Stream)
    }

    /// Size of each dimension.
    pub(crate) fn sizes(&self) -> &[i64] {
        self.0.sizes()
    }

    /// Number of elements.
    pub(crate) fn count(&self) -> usize {
        self.0.count()
    }

    /// Size of the last dimension; 1 for a scalar.
    pub(crate) fn columns(&self) -> usize {
        self.0.columns()
    }

    /// Elements between neighbours in each dimension.
    pub(crate) fn strides(&self) -> &[i64] {
        self.0.strides()
    }

    /// Whether the elements lie in one row-major piece.
    pub(crate) fn is_contiguous(&self) -> bool {
        self.0.is_contiguous()
    }

    /// Where the first element is.
    pub(crate) fn address(&self) -> u64 {
        self.0.data.expose_provenance() as u64
    }

    /// The tensor.
    pub(crate) fn into_tensor(self) -> Bound<'py, PyAny> {
        self.0.owner
    }

    /// The same numbers in one row-major piece: itself where it is one, else a copy that torch makes.
    pub(crate) fn contiguous(self) -> PyResult<Self> {
        if self.0.is_contiguous() {
            return Ok(self);
        }
        let copy = self.0.owner.call_method0(intern!(self.0.owner.py(), "contiguous"))?;
        Self::new(self.0.name, &copy)
    }

    /// The same tensor with a contiguous last dimension: itself where it has one, else a copy that torch makes.
    pub(crate) fn with_contiguous_rows(self) -> PyResult<Self> {
        if self.0.has_contiguous_rows() { Ok(self) } else { self.contiguous() }
    }
}

impl<'py> CudaView<'py> {
    /// Dtype of the elements.
    pub(crate) fn dtype(&self) -> Dtype {
        self.0.kind
    }

    /// The same numbers in float32, which is exact, in one row-major piece.
    pub(crate) fn floats(self) -> PyResult<CudaView<'py, Float32>> {
        match self.dtype() {
            Dtype::Float32 => CudaView(self.0.with_kind(Float32)).contiguous(),
            Dtype::BFloat16 | Dtype::Float16 => {
                let floats = self.0.owner.call_method0(intern!(self.0.owner.py(), "float"))?;
                CudaView::new(self.0.name, &floats)?.contiguous()
            }
        }
    }

    /// Its rows as a kernel takes them; of a copy that torch makes where the last dimension is not contiguous, or where the
    /// outer ones are more than a kernel counts.
    pub(crate) fn rows(self) -> PyResult<(Self, DeviceRows)> {
        let view = self.with_contiguous_rows()?;
        match view.device_rows() {
            Ok(rows) => Ok((view, rows)),
            Err(_) if !view.0.is_contiguous() => {
                let copy = view.contiguous()?;
                let rows = copy.device_rows().map_err(gate::cuda_to_python)?;
                Ok((copy, rows))
            }
            Err(error) => Err(gate::cuda_to_python(error)),
        }
    }

    fn device_rows(&self) -> vhead_cuda::Result<DeviceRows> {
        let outer = self.sizes().len().saturating_sub(1);
        let sizes: Vec<u64> = self.sizes().iter().take(outer).map(|&size| unsigned(size) as u64).collect();
        let strides = self.0.strides().get(..outer).unwrap_or_default();
        DeviceRows::new(self.address(), self.dtype(), &sizes, strides, self.columns() as u64)
    }
}
