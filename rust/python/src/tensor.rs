//! A checked view of a torch tensor: the only place where a pointer of torch's becomes a slice.
use crate::dlpack;
use crate::torch::{Dtype, Torch};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use std::borrow::Cow;
use vhead_core::{Element, Rows};

/// Dtype, sizes, strides and address of a CPU tensor that this view keeps alive.
#[derive(Debug)]
pub(crate) struct TensorView<'py> {
    name: &'static str,
    owner: Bound<'py, PyAny>,
    data: *const u8,
    dtype: Dtype,
    /// Sizes, then strides in elements.
    layout: Vec<i64>,
}

impl<'py> TensorView<'py> {
    /// A view of `tensor`, which errors call `name`; its dtype must be among `expected`.
    ///
    /// # Errors
    /// `TypeError` for what is no tensor, a tensor subclass with data of its own kind, or another dtype; `ValueError` for
    /// another device, another layout, or a negative view (whose memory holds the values negated).
    pub(crate) fn new(name: &'static str, tensor: &Bound<'py, PyAny>, expected: &[Dtype]) -> PyResult<Self> {
        let torch = Torch::get(tensor.py())?;
        check_kind(name, tensor, torch)?;
        let view = match torch.exchange() {
            Some(exchange) => match exchange.view(tensor) {
                Ok(view) => Self::from_dlpack(name, tensor, &view, expected)?,
                Err(error) => return Err(no_storage(name, tensor, error)),
            },
            None => Self::from_attributes(name, tensor, torch, expected)?,
        };
        if view.data.is_null() && view.count() > 0 {
            return Err(PyValueError::new_err(format!("{name}: expected a tensor with storage, got one without")));
        }
        Ok(view)
    }

    fn from_dlpack(
        name: &'static str,
        tensor: &Bound<'py, PyAny>,
        view: &dlpack::Tensor,
        expected: &[Dtype],
    ) -> PyResult<Self> {
        if view.device.kind != dlpack::CPU {
            return Err(wrong_device(name, tensor)?);
        }
        let dtype = match Dtype::from_dlpack(view.dtype) {
            Some(dtype) if expected.contains(&dtype) => dtype,
            _ => return Err(wrong_dtype(name, tensor, expected)?),
        };
        let dimensions = usize::try_from(view.dimensions)?;
        let mut layout = Vec::with_capacity(2 * dimensions);
        for pointer in [view.sizes, view.strides].into_iter().filter(|_| dimensions > 0) {
            // SAFETY: DLPack promises `dimensions` sizes and as many strides while the tensor lives; torch gives both.
            layout.extend_from_slice(unsafe { std::slice::from_raw_parts(pointer, dimensions) });
        }
        let data = view.data.cast_const().cast::<u8>().wrapping_add(usize::try_from(view.byte_offset)?);
        Ok(Self { name, owner: tensor.clone(), data, dtype, layout })
    }

    fn from_attributes(
        name: &'static str,
        tensor: &Bound<'py, PyAny>,
        torch: &Torch,
        expected: &[Dtype],
    ) -> PyResult<Self> {
        let py = tensor.py();
        if !tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return Err(wrong_device(name, tensor)?);
        }
        let dtype = match torch.dtype(&tensor.getattr(intern!(py, "dtype"))?) {
            Some(dtype) if expected.contains(&dtype) => dtype,
            _ => return Err(wrong_dtype(name, tensor, expected)?),
        };
        if !torch.is_strided(&tensor.getattr(intern!(py, "layout"))?) {
            return Err(wrong_layout(name, tensor)?);
        }
        let mut layout: Vec<i64> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        layout.extend(tensor.call_method0(intern!(py, "stride"))?.extract::<Vec<i64>>()?);
        let address: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        Ok(Self { name, owner: tensor.clone(), data: std::ptr::with_exposed_provenance(address), dtype, layout })
    }

    /// Dtype of the elements.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Size of each dimension.
    pub(crate) fn sizes(&self) -> &[i64] {
        self.layout.split_at(self.layout.len() / 2).0
    }

    fn strides(&self) -> &[i64] {
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

    /// The same tensor with a contiguous last dimension: itself where it has one, else a copy that torch makes.
    pub(crate) fn with_contiguous_rows(self) -> PyResult<Self> {
        if self.columns() <= 1 || self.strides().last() == Some(&1) {
            return Ok(self);
        }
        let copy = self.owner.call_method0(intern!(self.owner.py(), "contiguous"))?;
        Self::new(self.name, &copy, &[self.dtype])
    }

    /// The rows of a tensor whose last dimension is contiguous ([`Self::with_contiguous_rows`]) and whose dtype is `T`.
    pub(crate) fn rows<T: Element>(&self) -> Rows<'_, T> {
        debug_assert_eq!(self.dtype.name(), T::NAME);
        let outer = self.sizes().len().saturating_sub(1);
        let sizes: Vec<usize> = self.sizes().iter().take(outer).map(|&size| unsigned(size)).collect();
        let strides: Vec<isize> = self.strides().iter().take(outer).map(|&stride| stride as isize).collect();
        // SAFETY: torch promises that sizes and strides stay inside the storage, which the owner keeps alive for as long
        // as this view is borrowed. As in torch's own kernels, another thread that writes to the tensor meanwhile makes
        // the values unspecified.
        unsafe { Rows::from_raw(self.data.cast(), &sizes, &strides, self.columns()) }
    }

    /// All elements in row-major order as float32, which is exact from every dtype that hidden states may have; borrowed
    /// where they lie so in memory.
    pub(crate) fn floats(&self) -> Cow<'_, [f32]> {
        match self.dtype {
            Dtype::Float32 if self.is_slice_of::<f32>() => {
                // SAFETY: aligned, contiguous, of this dtype, and kept alive by the owner.
                Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.data.cast(), self.count()) })
            }
            Dtype::Float32 => Cow::Owned(self.collect::<f32, f32>(|x| x)),
            Dtype::BFloat16 => Cow::Owned(self.collect(half::bf16::to_f32)),
            Dtype::Float16 => Cow::Owned(self.collect(half::f16::to_f32)),
            Dtype::Int64 => Cow::Owned(self.collect(|x: i64| x as f32)),
        }
    }

    /// The one element of an int64 tensor, as torch draws seeds.
    ///
    /// # Errors
    /// `ValueError` where there is not exactly one.
    pub(crate) fn seed(&self) -> PyResult<u64> {
        match self.collect::<i64, i64>(|x| x).as_slice() {
            [seed] if self.dtype == Dtype::Int64 => Ok(seed.cast_unsigned()),
            _ => Err(PyValueError::new_err(format!(
                "{}: expected one int64 number, got sizes {:?}",
                self.name,
                self.sizes()
            ))),
        }
    }

    /// All elements of an int64 tensor in row-major order.
    pub(crate) fn integers(&self) -> Vec<i64> {
        debug_assert_eq!(self.dtype, Dtype::Int64);
        self.collect::<i64, i64>(|x| x)
    }

    /// The elements of a contiguous float32 tensor, to be changed in place.
    ///
    /// # Errors
    /// `ValueError` where they do not lie in one row-major piece.
    pub(crate) fn overwritten(&mut self) -> PyResult<&mut [f32]> {
        if self.count() == 0 {
            return Ok(&mut []);
        }
        if self.dtype != Dtype::Float32 || !self.is_slice_of::<f32>() {
            return Err(PyValueError::new_err(format!("{}: expected a contiguous float32 tensor", self.name)));
        }
        // SAFETY: aligned, contiguous, of this dtype, and kept alive by the owner. The caller asks for an operation in
        // place; as with torch's own, another thread that uses the tensor meanwhile sees unspecified values.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.cast_mut().cast(), self.count()) })
    }

    fn is_slice_of<T>(&self) -> bool {
        let contiguous = self
            .sizes()
            .iter()
            .zip(self.strides())
            .rev()
            .try_fold(1, |expected, (&size, &stride)| (size == 1 || stride == expected).then_some(expected * size));
        self.count() > 0 && contiguous.is_some() && self.data.cast::<T>().is_aligned()
    }

    fn collect<T: Copy, U>(&self, convert: impl Fn(T) -> U) -> Vec<U> {
        let sizes: Vec<usize> = self.sizes().iter().map(|&size| unsigned(size)).collect();
        let strides: Vec<isize> = self.strides().iter().map(|&stride| stride as isize).collect();
        // SAFETY: as in `rows`, with rows of one element.
        let rows = unsafe { Rows::<T>::from_raw(self.data.cast(), &sizes, &strides, 1) };
        // SAFETY: `row` is valid for one unaligned read below `count`.
        (0..rows.count()).map(|i| convert(unsafe { rows.row(i).read_unaligned() })).collect()
    }
}

/// A tensor that torch has just allocated for a result, so that nobody else can see it yet.
#[derive(Debug)]
pub(crate) struct Output<'py> {
    object: Bound<'py, PyAny>,
    data: *mut u8,
    count: usize,
}

impl<'py> Output<'py> {
    /// A contiguous CPU tensor with elements of type `T`, not initialised.
    ///
    /// # Errors
    /// What torch raises when it cannot allocate.
    pub(crate) fn new(py: Python<'py>, sizes: &[i64], dtype: Dtype) -> PyResult<Self> {
        let object = Torch::get(py)?.empty(py, sizes, dtype)?;
        let address: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let count = sizes.iter().map(|&size| unsigned(size)).product();
        Ok(Self { object, data: std::ptr::with_exposed_provenance_mut(address), count })
    }

    /// The elements, to be written. `T` must be the dtype that the tensor was made with.
    pub(crate) fn elements<T: Element>(&mut self) -> &mut [T] {
        if self.count == 0 {
            return &mut [];
        }
        // SAFETY: torch allocated `count` elements of this dtype, aligned to at least 64 bytes, and this is the only
        // reference; every bit pattern is a value of `T`.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.count) }
    }

    /// The tensor.
    pub(crate) fn into_tensor(self) -> Bound<'py, PyAny> {
        self.object
    }
}

/// torch's sizes are never negative.
fn unsigned(size: i64) -> usize {
    usize::try_from(size).unwrap_or(0)
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

fn wrong_device(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    let device = tensor.getattr("device")?.str()?;
    Ok(PyValueError::new_err(format!("{name}: expected a tensor on cpu, got one on {device}")))
}

fn wrong_dtype(name: &str, tensor: &Bound<'_, PyAny>, expected: &[Dtype]) -> PyResult<PyErr> {
    let names: Vec<&str> = expected.iter().map(|dtype| dtype.name()).collect();
    let actual = tensor.getattr("dtype")?.str()?.to_string();
    let actual = actual.trim_start_matches("torch.");
    Ok(PyTypeError::new_err(format!("{name}: expected {}, got {actual}", names.join(" or "))))
}

fn wrong_layout(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<PyErr> {
    let layout = tensor.getattr("layout")?.str()?;
    Ok(PyValueError::new_err(format!("{name}: expected a dense tensor, got layout {layout}")))
}

/// Says why DLPack could not view the tensor, in the words that the other way of reading uses.
fn no_storage(name: &str, tensor: &Bound<'_, PyAny>, cause: PyErr) -> PyErr {
    let py = tensor.py();
    let on_cpu = tensor.getattr("is_cpu").and_then(|answer| answer.is_truthy());
    let error = match on_cpu {
        Ok(true) => wrong_layout(name, tensor),
        Ok(false) => wrong_device(name, tensor),
        Err(error) => Err(error),
    };
    let error = error.unwrap_or_else(|error| error);
    error.set_cause(py, Some(cause));
    error
}
