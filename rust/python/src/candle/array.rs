//! Arrays of numpy and of whoever speaks DLPack, as rows of hidden states where they lie; and new numpy arrays.
use crate::{dlpack, gate};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyDict, PyType};
use vhead_core::{Dtype, Element, Rows, allocation, with_element};

/// Nothing is below this: systems keep the first page free, so that null pointers and what is near them fault.
const START_OF_MEMORY: i128 = 4096;

/// No address of a process is above this: five levels of page tables, of which the system takes the upper half.
const END_OF_MEMORY: i128 = 1 << 56;

/// What numpy and torch allow.
const MOST_DIMENSIONS: usize = 64;

/// A CPU array of at least one dimension, kept alive by this view.
#[derive(Debug)]
pub(super) struct ArrayView<'py> {
    /// The array, or the capsule that it exported: either keeps the memory.
    owner: Bound<'py, PyAny>,
    data: *const u8,
    dtype: Dtype,
    sizes: Vec<usize>,
    /// In elements.
    strides: Vec<isize>,
}

impl<'py> ArrayView<'py> {
    /// A view of `array`, which errors call `name`.
    ///
    /// # Errors
    /// `TypeError` for what is no array or has another dtype, `ValueError` for a scalar or another device, and what the
    /// array's own library raises when it cannot export it.
    pub(super) fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = array.py();
        let view = if array.is_instance(ndarray(py)?)? {
            Self::from_numpy(name, array)?
        } else if array.hasattr(intern!(py, "__dlpack__"))? {
            Self::from_dlpack(name, array)?
        } else {
            let got = array.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!("{name}: expected a numpy array or a DLPack tensor, got {got}")));
        };
        if view.sizes.is_empty() {
            return Err(PyValueError::new_err(format!("{name}: expected at least one dimension, got a scalar")));
        }
        Ok(view)
    }

    fn from_numpy(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = array.py();
        let dtype = numpy_dtype(name, &array.getattr(intern!(py, "dtype"))?)?;
        let interface = array.getattr(intern!(py, "__array_interface__"))?.cast_into::<PyDict>()?;
        let item =
            |key: &str| interface.get_item(key)?.ok_or_else(|| PyTypeError::new_err(format!("{name}: no {key}")));
        let (address, _read_only): (usize, bool) = item("data")?.extract()?;
        let sizes: Vec<usize> = item("shape")?.extract()?;
        let bytes: Option<Vec<isize>> = item("strides")?.extract()?;
        let size = dtype.size().cast_signed();
        let strides = match bytes {
            // A field of packed records: its elements are not whole elements apart.
            Some(bytes) if bytes.iter().any(|stride| stride % size != 0) => {
                let copy = py.import("numpy")?.call_method1("ascontiguousarray", (array,))?;
                return Self::from_numpy(name, &copy);
            }
            Some(bytes) => bytes.iter().map(|stride| stride / size).collect(),
            None => contiguous(&sizes),
        };
        check_memory(name, address as i128, dtype, &sizes, &strides)?;
        let data = std::ptr::with_exposed_provenance(address);
        Ok(Self { owner: array.clone(), data, dtype, sizes, strides })
    }

    fn from_dlpack(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let (device, index): (i32, i64) = array.call_method0(intern!(array.py(), "__dlpack_device__"))?.extract()?;
        if device != dlpack::CPU {
            return Err(elsewhere(name, device, index));
        }
        let owner = export(array)?;
        let tensor = exported(&owner)?;
        if tensor.device.kind != dlpack::CPU {
            return Err(elsewhere(name, tensor.device.kind, tensor.device.index.into()));
        }
        let dtype = dlpack_dtype(name, tensor.dtype)?;
        let (sizes, strides) = layout(name, &tensor)?;
        check_memory(name, tensor.data.addr() as i128 + i128::from(tensor.byte_offset), dtype, &sizes, &strides)?;
        let data = tensor.data.cast_const().cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        Ok(Self { owner: owner.into_any(), data, dtype, sizes, strides })
    }

    pub(super) fn py(&self) -> Python<'py> {
        self.owner.py()
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Size of each dimension, at least one.
    pub(super) fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The rows, where they lie; gathered into `copy` where the last dimension has gaps. `T` must be the dtype.
    ///
    /// # Errors
    /// `AllocationError`: there is no memory for the copy.
    pub(super) fn rows<'a, T: Element>(&'a self, copy: &'a mut Vec<T>) -> PyResult<Rows<'a, T>> {
        let (&columns, outer) = self.sizes.split_last().unwrap_or((&0, &[]));
        let (&step, strides) = self.strides.split_last().unwrap_or((&1, &[]));
        let data = self.data.cast::<T>();
        if step == 1 || columns <= 1 {
            // SAFETY: the array's library promises that sizes and strides stay inside its memory, which the owner keeps.
            // Another thread that writes to it meanwhile makes the values unspecified, as in the library's own functions.
            return Ok(unsafe { Rows::from_raw(data, outer, strides, columns) });
        }
        // SAFETY: as above, for the first element of each row.
        let starts = unsafe { Rows::from_raw(data, outer, strides, 1) };
        *copy = allocation::reserved(starts.count().saturating_mul(columns)).map_err(gate::to_python)?;
        for row in 0..starts.count() {
            // SAFETY: as above, for every element of the row.
            let read = |h: usize| unsafe { starts.row(row).wrapping_offset(h.cast_signed() * step).read_unaligned() };
            copy.extend((0..columns).map(read));
        }
        // SAFETY: `copy` has been filled with that many rows and stays borrowed.
        Ok(unsafe { Rows::from_raw(copy.as_ptr(), &[starts.count()], &[columns.cast_signed()], columns) })
    }

    /// All elements in row-major order as float32, exactly.
    ///
    /// # Errors
    /// `AllocationError`: a broadcast array has more elements than memory.
    pub(super) fn floats(&self) -> PyResult<Vec<f32>> {
        with_element!(self.dtype, T => self.widened::<T>())
    }

    fn widened<T: Element>(&self) -> PyResult<Vec<f32>> {
        // SAFETY: as in `rows`, with rows of one element.
        let rows = unsafe { Rows::<T>::from_raw(self.data.cast(), &self.sizes, &self.strides, 1) };
        // SAFETY: a row is valid for one unaligned read.
        let elements = (0..rows.count()).map(|row| unsafe { rows.row(row).read_unaligned() }.to_f32());
        allocation::collected(rows.count(), elements).map_err(gate::to_python)
    }
}

/// A new float32 numpy array that nobody else can see yet.
#[derive(Debug)]
pub(super) struct Output<'py> {
    array: Bound<'py, PyAny>,
    data: *mut f32,
    count: usize,
}

impl<'py> Output<'py> {
    pub(super) fn new(py: Python<'py>, sizes: &[usize]) -> PyResult<Self> {
        static EMPTY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let array = EMPTY.import(py, "numpy", "empty")?.call1((sizes, intern!(py, "float32"))).map_err(|error| {
            let refused = error.is_instance_of::<PyMemoryError>(py);
            if refused { gate::AllocationError::new_err(error.value(py).to_string()) } else { error }
        })?;
        let (data, count) = if sizes.is_empty() {
            // PyO3 refuses the buffer of a scalar array, which has no sizes to point at.
            (ArrayView::from_numpy("output", &array)?.data.cast_mut().cast(), 1)
        } else {
            let buffer = PyUntypedBuffer::get(&array)?;
            (buffer.buf_ptr().cast(), buffer.item_count())
        };
        Ok(Self { array, data, count })
    }

    /// The elements, to be written.
    pub(super) fn elements(&mut self) -> &mut [f32] {
        if self.count == 0 {
            return &mut [];
        }
        // SAFETY: numpy allocated `count` aligned float32 elements, and this is the only reference to them.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.count) }
    }

    pub(super) fn into_array(self) -> Bound<'py, PyAny> {
        self.array
    }
}

/// `numpy.ndarray`.
fn ndarray(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static NDARRAY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    NDARRAY.import(py, "numpy", "ndarray")
}

fn numpy_dtype(name: &str, dtype: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    let py = dtype.py();
    // numpy puts names together in Python, which takes longer than a small projection; its own dtypes have letters.
    let actual = match dtype.getattr(intern!(py, "char"))?.extract::<char>()? {
        'f' => "float32".to_owned(),
        'e' => "float16".to_owned(),
        _ => dtype.getattr(intern!(py, "name"))?.extract()?,
    };
    match Dtype::from_name(&actual) {
        Some(dtype_of_array) if dtype.getattr(intern!(py, "isnative"))?.is_truthy()? => Ok(dtype_of_array),
        Some(_) => Err(wrong_dtype(name, &format!("{actual} of the other byte order"))),
        None => Err(wrong_dtype(name, &actual)),
    }
}

fn dlpack_dtype(name: &str, dtype: dlpack::DataType) -> PyResult<Dtype> {
    const KINDS: [&str; 7] = ["int", "uint", "float", "handle", "bfloat", "complex", "bool"];
    let dlpack::DataType { code, bits, lanes } = dtype;
    let actual = match KINDS.get(usize::from(code)) {
        Some(kind) if lanes == 1 => format!("{kind}{bits}"),
        _ => format!("DLPack dtype {code} of {bits} bits in {lanes} lanes"),
    };
    Dtype::from_name(&actual).ok_or_else(|| wrong_dtype(name, &actual))
}

fn wrong_dtype(name: &str, actual: &str) -> PyErr {
    PyTypeError::new_err(format!("{name}: expected {}, got {actual}", Dtype::ALL.map(Dtype::name).join(" or ")))
}

fn elsewhere(name: &str, device: i32, index: i64) -> PyErr {
    let actual = match device {
        dlpack::CUDA => {
            format!("CUDA device {index}: that is for vhead.ops.value_head, which takes torch tensors there")
        }
        other => format!("DLPack device {other}"),
    };
    PyValueError::new_err(format!("{name}: expected an array on the CPU, got one on {actual}"))
}

/// Strides of a C-contiguous array.
fn contiguous(sizes: &[usize]) -> Vec<isize> {
    let mut strides = vec![1_isize; sizes.len()];
    for i in (1..sizes.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(sizes[i].cast_signed());
    }
    strides
}

/// The capsule of `array.__dlpack__()`, versioned where the library knows versions.
///
/// The capsule is not consumed: one that keeps its name frees its tensor when it goes, so it serves as the owner.
fn export<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyCapsule>> {
    let py = array.py();
    let method = array.getattr(intern!(py, "__dlpack__"))?;
    let arguments = PyDict::new(py);
    arguments.set_item(intern!(py, "max_version"), (1, 3))?;
    let capsule = match method.call((), Some(&arguments)) {
        Err(error) if error.is_instance_of::<PyTypeError>(py) => method.call0()?,
        answer => answer?,
    };
    Ok(capsule.cast_into()?)
}

/// `DLManagedTensorVersioned` up to the tensor.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *const u8,
    deleter: *const u8,
    flags: u64,
    tensor: dlpack::Tensor,
}

fn exported(capsule: &Bound<'_, PyCapsule>) -> PyResult<dlpack::Tensor> {
    let Ok(versioned) = capsule.pointer_checked(Some(c"dltensor_versioned")) else {
        // `DLManagedTensor` starts with the tensor.
        let tensor = capsule.pointer_checked(Some(c"dltensor"))?.cast::<dlpack::Tensor>();
        // SAFETY: DLPack promises this structure behind a capsule of this name.
        return Ok(unsafe { *tensor.as_ref() });
    };
    // SAFETY: as above; the version comes first in every version, and is looked at first.
    let major = unsafe { *versioned.cast::<u32>().as_ref() };
    if major != 1 {
        return Err(PyBufferError::new_err(format!("expected a DLPack 1 tensor, got version {major}")));
    }
    // SAFETY: as above.
    Ok(unsafe { versioned.cast::<Versioned>().as_ref() }.tensor)
}

/// Sizes, and strides in elements, of an exported tensor.
fn layout(name: &str, tensor: &dlpack::Tensor) -> PyResult<(Vec<usize>, Vec<isize>)> {
    let wrong = |problem: String| PyValueError::new_err(format!("{name}: expected {problem}"));
    let dimensions = match usize::try_from(tensor.dimensions) {
        Ok(dimensions) if dimensions <= MOST_DIMENSIONS => dimensions,
        _ => return Err(wrong(format!("0 to {MOST_DIMENSIONS} dimensions, got {}", tensor.dimensions))),
    };
    if dimensions > 0 && (tensor.sizes.is_null() || !tensor.sizes.is_aligned() || !tensor.strides.is_aligned()) {
        return Err(wrong(format!(
            "sizes and strides in memory, got some at {:p} and {:p}",
            tensor.sizes, tensor.strides
        )));
    }
    // SAFETY: the exporter describes `dimensions` sizes and strides, and the capsule keeps them.
    let (sizes, strides) = unsafe { (numbers(tensor.sizes, dimensions), numbers(tensor.strides, dimensions)) };
    let sizes = sizes.unwrap_or_default();
    let Ok(sizes) = sizes.iter().map(|&size| usize::try_from(size)).collect::<Result<Vec<_>, _>>() else {
        return Err(wrong(format!("sizes that are not negative, got {sizes:?}")));
    };
    let strides = strides.map(|strides| strides.into_iter().map(|stride| stride as isize).collect());
    let strides = strides.unwrap_or_else(|| contiguous(&sizes));
    Ok((sizes, strides))
}

/// `count` numbers at `pointer`; none where it is null.
///
/// # Safety
/// `pointer` is null, or aligned and good for `count` reads.
unsafe fn numbers(pointer: *const i64, count: usize) -> Option<Vec<i64>> {
    // SAFETY: as the caller promises.
    (!pointer.is_null()).then(|| unsafe { std::slice::from_raw_parts(pointer, count) }.to_vec())
}

/// Refuses what cannot be an array in this process's memory: whether it is one is its library's promise.
fn check_memory(name: &str, address: i128, dtype: Dtype, sizes: &[usize], strides: &[isize]) -> PyResult<()> {
    if sizes.contains(&0) {
        return Ok(());
    }
    let fits = sizes.len() == strides.len()
        && reach(sizes, strides).is_some_and(|(first, last)| {
            let size = dtype.size() as i128;
            let inside = |element: i128| element.checked_mul(size)?.checked_add(address);
            inside(first).is_some_and(|start| start >= START_OF_MEMORY)
                && inside(last + 1).is_some_and(|end| end <= END_OF_MEMORY)
        });
    if fits {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{name}: expected an array in memory, got sizes {sizes:?} with strides {strides:?} at address {address:#x}"
    )))
}

/// The first and the last element that an array reads, counted from where it starts; `None` where there are more elements
/// than can be counted.
fn reach(sizes: &[usize], strides: &[isize]) -> Option<(i128, i128)> {
    sizes.iter().try_fold(1_isize, |count, &size| count.checked_mul(isize::try_from(size).ok()?))?;
    sizes.iter().zip(strides).try_fold((0_i128, 0_i128), |(first, last), (&size, &stride)| {
        let reach = (size as i128 - 1).checked_mul(stride as i128)?;
        Some((first.checked_add(reach.min(0))?, last.checked_add(reach.max(0))?))
    })
}
