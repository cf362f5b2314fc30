//! DLPack 1.3's C structures and the table of functions that torch >= 2.10 exports on its tensor types.
//!
//! Source: `dlpack.h` of DLPack 1.3, `DLPackExchangeAPI`. Only what is called here is typed. The table's allocator is not
//! used: it is no faster than `torch.empty`, and the storage of its tensors cannot be resized.
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

/// `kDLCPU`.
pub(crate) const CPU: i32 = 1;
/// `kDLCUDA`.
pub(crate) const CUDA: i32 = 2;

type View = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;
type CurrentStream = unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int;

/// `DLDevice`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) index: i32,
}

/// `DLDataType`: (2, 32) is float32, (2, 16) float16, (4, 16) bfloat16, (0, 64) int64.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tensor {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) dimensions: i32,
    pub(crate) dtype: DataType,
    pub(crate) sizes: *mut i64,
    pub(crate) strides: *mut i64,
    pub(crate) byte_offset: u64,
}

impl Tensor {
    /// No data, no dimensions.
    const EMPTY: Self = Self {
        data: null_mut(),
        device: Device { kind: CPU, index: 0 },
        dimensions: 0,
        dtype: DataType { code: 2, bits: 32, lanes: 1 },
        sizes: null_mut(),
        strides: null_mut(),
        byte_offset: 0,
    };
}

#[repr(C)]
#[derive(Debug)]
struct Table {
    major: u32,
    minor: u32,
    previous: *const Self,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    object_from_managed: *const c_void,
    view: Option<View>,
    current_stream: Option<CurrentStream>,
}

/// The functions of a tensor type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange {
    view: View,
    current_stream: CurrentStream,
}

impl Exchange {
    /// The table of `kind`, where it has one of major version 1 with functions for views and streams.
    pub(crate) fn of(kind: &Bound<'_, PyType>) -> Option<Self> {
        let capsule = kind.getattr("__dlpack_c_exchange_api__").ok()?;
        let pointer = capsule.cast::<PyCapsule>().ok()?.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        // SAFETY: DLPack promises that a capsule of this name holds a table that lives as long as the process.
        let table = unsafe { pointer.cast::<Table>().as_ref() };
        if table.major != 1 {
            return None;
        }
        Some(Self { view: table.view?, current_stream: table.current_stream? })
    }

    /// A borrowed description of `tensor`: valid while `tensor` lives and nobody resizes it.
    ///
    /// # Errors
    /// What the tensor's own library raises: tensors without storage (meta, sparse) cannot be viewed.
    pub(crate) fn view(&self, tensor: &Bound<'_, PyAny>) -> PyResult<Tensor> {
        let mut view = Tensor::EMPTY;
        // SAFETY: the function came from the type of `tensor`, the thread is attached, and `view` is written only.
        let status = unsafe { (self.view)(tensor.as_ptr().cast(), &raw mut view) };
        if status == 0 { Ok(view) } else { Err(PyErr::fetch(tensor.py())) }
    }
    /// The stream that the library sends its work on `device` to now; 0 is the device's default stream.
    ///
    /// # Errors
    /// What the library raises.
    pub(crate) fn current_stream(&self, py: Python<'_>, device: Device) -> PyResult<usize> {
        let mut stream = null_mut();
        // SAFETY: the table's function, on a device that a tensor of the same library is on; it writes a handle.
        let status = unsafe { (self.current_stream)(device.kind, device.index, &raw mut stream) };
        if status == 0 { Ok(stream.expose_provenance()) } else { Err(PyErr::fetch(py)) }
    }
}
