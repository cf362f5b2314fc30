//! DLPack 1.3's C structures and the table of functions that torch >= 2.10 exports on its tensor types.
//!
//! Source: `dlpack.h` of DLPack 1.3, `DLPackExchangeAPI`. Only what is called here is typed.
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{c_char, c_int, c_void};
use std::ptr::null_mut;

/// `kDLCPU`.
pub(crate) const CPU: i32 = 1;

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

type SetError = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char);

#[repr(C)]
#[derive(Debug)]
struct Table {
    major: u32,
    minor: u32,
    previous: *const Self,
    allocate: Option<unsafe extern "C" fn(*mut Tensor, *mut *mut c_void, *mut c_void, SetError) -> c_int>,
    managed_from_object: *const c_void,
    object_from_managed: Option<unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> c_int>,
    view: Option<unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int>,
    current_stream: *const c_void,
}

/// The functions of a tensor type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange {
    allocate: unsafe extern "C" fn(*mut Tensor, *mut *mut c_void, *mut c_void, SetError) -> c_int,
    object_from_managed: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> c_int,
    view: unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int,
}

impl Exchange {
    /// The table of `kind`, where it has one of major version 1 with every function that is needed.
    pub(crate) fn of(kind: &Bound<'_, PyType>) -> Option<Self> {
        let capsule = kind.getattr("__dlpack_c_exchange_api__").ok()?;
        let pointer = capsule.cast::<PyCapsule>().ok()?.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        // SAFETY: DLPack promises that a capsule of this name holds a table that lives as long as the process.
        let table = unsafe { pointer.cast::<Table>().as_ref() };
        if table.major != 1 {
            return None;
        }
        Some(Self { allocate: table.allocate?, object_from_managed: table.object_from_managed?, view: table.view? })
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

    /// A new contiguous tensor on the CPU, from the library's own allocator; its elements are not initialised.
    ///
    /// # Errors
    /// `RuntimeError` where the library cannot allocate, with its message.
    pub(crate) fn empty<'py>(&self, py: Python<'py>, sizes: &[i64], dtype: DataType) -> PyResult<Bound<'py, PyAny>> {
        let mut sizes = sizes.to_vec();
        let dimensions = i32::try_from(sizes.len())?;
        let mut prototype = Tensor { sizes: sizes.as_mut_ptr(), dimensions, dtype, ..Tensor::EMPTY };
        let (mut managed, mut object) = (null_mut(), null_mut());
        let mut message = String::new();
        // SAFETY: the prototype and the message outlive the call; `keep_message` casts the context back to a `String`.
        let status =
            unsafe { (self.allocate)(&raw mut prototype, &raw mut managed, (&raw mut message).cast(), keep_message) };
        if status != 0 || managed.is_null() {
            return Err(PyErr::take(py).unwrap_or_else(|| pyo3::exceptions::PyRuntimeError::new_err(message)));
        }
        // SAFETY: `managed` is what the allocator just made; this call takes it over and gives a new reference.
        unsafe {
            let status = (self.object_from_managed)(managed, &raw mut object);
            if status == 0 { Ok(Bound::from_owned_ptr(py, object.cast())) } else { Err(PyErr::fetch(py)) }
        }
    }
}

unsafe extern "C" fn keep_message(context: *mut c_void, _kind: *const c_char, message: *const c_char) {
    if !context.is_null() && !message.is_null() {
        // SAFETY: the context is the `String` that `empty` passed, the message a C string of the library.
        unsafe { *context.cast::<String>() = std::ffi::CStr::from_ptr(message).to_string_lossy().into_owned() };
    }
}
