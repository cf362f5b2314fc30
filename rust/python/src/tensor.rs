//! A checked view of a CPU tensor: the only place where a pointer of torch's becomes a slice.
use crate::backend::DropoutArguments;
use crate::description::{Description, Place, unsigned};
use crate::dtype::{Float32, Int64, Kind, Scalar};
use crate::gate;
use crate::torch::Torch;
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use std::borrow::Cow;
use std::marker::PhantomData;
use vhead_core::allocation::collected;
use vhead_core::{Dropout, Dtype, Element, Rows};

/// A CPU tensor of one kind, which this view keeps alive.
#[derive(Debug)]
pub(crate) struct TensorView<'py, K = Dtype>(Description<'py, K>);

impl<'py, K: Kind> TensorView<'py, K> {
    /// A view of `tensor`, which errors call `name`.
    ///
    /// # Errors
    /// As [`Description::new`].
    pub(crate) fn new(name: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<Self> {
        Description::new(name, tensor, Place::Cpu).map(Self)
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

    /// The same tensor with a contiguous last dimension: itself where it has one, else a copy that torch makes.
    pub(crate) fn with_contiguous_rows(self) -> PyResult<Self> {
        if self.0.has_contiguous_rows() {
            return Ok(self);
        }
        let copy = self.0.owner.call_method0(intern!(self.0.owner.py(), "contiguous"))?;
        Self::new(self.0.name, &copy)
    }

    /// Rows of `T`, which is the dtype that the kind stands for.
    fn rows_of<T: Element>(&self) -> Rows<'_, T> {
        let outer = self.sizes().len().saturating_sub(1);
        let sizes: Vec<usize> = self.sizes().iter().take(outer).map(|&size| unsigned(size)).collect();
        let strides: Vec<isize> = self.0.strides().iter().take(outer).map(|&stride| stride as isize).collect();
        // SAFETY: torch promises that sizes and strides stay inside the storage, which the owner keeps alive for as long
        // as this view is borrowed. As in torch's own kernels, another thread that writes to the tensor meanwhile makes
        // the values unspecified.
        unsafe { Rows::from_raw(self.0.data.cast(), &sizes, &strides, self.columns()) }
    }

    /// All elements in row-major order, of a kind that stands for float32; borrowed where they lie so in memory.
    fn float32(&self) -> PyResult<Cow<'_, [f32]>> {
        if self.is_slice_of::<f32>() {
            // SAFETY: aligned, contiguous, of this dtype, and kept alive by the owner.
            return Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.0.data.cast(), self.count()) }));
        }
        self.collect::<f32, f32>(|x| x).map(Cow::Owned)
    }

    fn is_slice_of<T>(&self) -> bool {
        self.count() > 0 && self.0.is_contiguous() && self.0.data.cast::<T>().is_aligned()
    }

    fn collect<T: Copy, U>(&self, convert: impl Fn(T) -> U) -> PyResult<Vec<U>> {
        let sizes: Vec<usize> = self.sizes().iter().map(|&size| unsigned(size)).collect();
        let strides: Vec<isize> = self.0.strides().iter().map(|&stride| stride as isize).collect();
        // SAFETY: as in `rows`, with rows of one element.
        let rows = unsafe { Rows::<T>::from_raw(self.0.data.cast(), &sizes, &strides, 1) };
        // SAFETY: `row` is valid for one unaligned read below `count`.
        let elements = (0..rows.count()).map(|i| convert(unsafe { rows.row(i).read_unaligned() }));
        collected(rows.count(), elements).map_err(gate::to_python)
    }
}

impl TensorView<'_> {
    /// Dtype of the elements.
    pub(crate) fn dtype(&self) -> Dtype {
        self.0.kind
    }

    /// The rows of a tensor whose last dimension is contiguous ([`Self::with_contiguous_rows`]) and whose dtype is `T`.
    pub(crate) fn rows<T: Element>(&self) -> Rows<'_, T> {
        debug_assert_eq!(self.dtype(), T::DTYPE);
        self.rows_of()
    }

    /// All elements in row-major order as float32, which is exact from every dtype that hidden states may have; borrowed
    /// where they lie so in memory.
    ///
    /// # Errors
    /// `AllocationError`: a broadcast tensor has more elements than memory.
    pub(crate) fn floats(&self) -> PyResult<Cow<'_, [f32]>> {
        match self.dtype() {
            Dtype::Float32 => self.float32(),
            Dtype::BFloat16 => self.collect(bf16::to_f32).map(Cow::Owned),
            Dtype::Float16 => self.collect(f16::to_f32).map(Cow::Owned),
        }
    }

    /// A copy of [`Self::floats`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn owned_floats(&self) -> PyResult<Vec<f32>> {
        match self.floats()? {
            Cow::Owned(floats) => Ok(floats),
            Cow::Borrowed(floats) => collected(floats.len(), floats.iter().copied()).map_err(gate::to_python),
        }
    }

    /// The elements of a contiguous bfloat16 tensor, to be changed in place.
    ///
    /// # Errors
    /// `ValueError` where it is no such tensor.
    pub(crate) fn overwritten_halves(&mut self) -> PyResult<&mut [bf16]> {
        if self.dtype() != Dtype::BFloat16 {
            return Err(PyValueError::new_err(format!(
                "{}: expected bfloat16, got {}",
                self.0.name,
                self.dtype().name()
            )));
        }
        self.overwritten_as("bfloat16")
    }
}

impl TensorView<'_, Float32> {
    /// The rows of a tensor whose last dimension is contiguous ([`Self::with_contiguous_rows`]).
    pub(crate) fn rows(&self) -> Rows<'_, f32> {
        self.rows_of()
    }

    /// All elements in row-major order; borrowed where they lie so in memory.
    ///
    /// # Errors
    /// `AllocationError`: a broadcast tensor has more elements than memory.
    pub(crate) fn elements(&self) -> PyResult<Cow<'_, [f32]>> {
        self.float32()
    }

    /// The elements of a contiguous tensor, to be changed in place.
    ///
    /// # Errors
    /// `ValueError` where they do not lie in one row-major piece.
    pub(crate) fn overwritten(&mut self) -> PyResult<&mut [f32]> {
        self.overwritten_as("float32")
    }
}

impl<K: Kind> TensorView<'_, K> {
    /// The elements of a contiguous tensor as `T`, the tensor's dtype, by name `dtype`; to be changed in place.
    ///
    /// # Errors
    /// `ValueError` where they do not lie in one row-major piece, or are of another dtype.
    pub(crate) fn overwritten_as<T: Element>(&mut self, dtype: &str) -> PyResult<&mut [T]> {
        if self.count() == 0 {
            return Ok(&mut []);
        }
        if !self.is_slice_of::<T>() {
            return Err(PyValueError::new_err(format!("{}: expected a contiguous {dtype} tensor", self.0.name)));
        }
        // SAFETY: aligned, contiguous, of this dtype, and kept alive by the owner. The caller asks for an operation in
        // place; as with torch's own, another thread that uses the tensor meanwhile sees unspecified values.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.0.data.cast_mut().cast(), self.count()) })
    }
}

impl TensorView<'_, Int64> {
    /// The one element, as torch draws seeds.
    ///
    /// # Errors
    /// `ValueError` where there is not exactly one.
    pub(crate) fn seed(&self) -> PyResult<u64> {
        match self.count() {
            1 => Ok(self.integers()?[0].cast_unsigned()),
            _ => Err(PyValueError::new_err(format!(
                "{}: expected one int64 number, got sizes {:?}",
                self.0.name,
                self.sizes()
            ))),
        }
    }

    /// All elements in row-major order.
    ///
    /// # Errors
    /// `AllocationError`: a broadcast tensor has more elements than memory.
    pub(crate) fn integers(&self) -> PyResult<Vec<i64>> {
        self.collect::<i64, i64>(|x| x)
    }
}

/// A tensor that torch has just allocated for a result, so that nobody else can see it yet.
#[derive(Debug)]
pub(crate) struct Output<'py, T> {
    object: Bound<'py, PyAny>,
    data: *mut u8,
    count: usize,
    elements: PhantomData<T>,
}

impl<'py, T: Element> Output<'py, T> {
    /// A contiguous CPU tensor with elements of type `T`, not initialised.
    ///
    /// # Errors
    /// What torch raises when it cannot allocate.
    pub(crate) fn new(py: Python<'py>, sizes: &[i64]) -> PyResult<Self> {
        Self::allocate(py, sizes, T::DTYPE.scalar())
    }
}

impl<'py> Output<'py, i64> {
    /// [`Output::new`] in int64.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn integers(py: Python<'py>, sizes: &[i64]) -> PyResult<Self> {
        Self::allocate(py, sizes, Scalar::Int64)
    }
}

impl<'py, T> Output<'py, T> {
    /// `scalar` is what `T` is to torch.
    fn allocate(py: Python<'py>, sizes: &[i64], scalar: Scalar) -> PyResult<Self> {
        let object = Torch::get(py)?.empty(py, sizes, scalar)?;
        let address: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let count = sizes.iter().map(|&size| unsigned(size)).product();
        let data = std::ptr::with_exposed_provenance_mut(address);
        Ok(Self { object, data, count, elements: PhantomData })
    }

    /// The elements, to be written.
    pub(crate) fn elements(&mut self) -> &mut [T] {
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

/// The mask's rule, with a seed that is in this process's memory.
///
/// # Errors
/// `ValueError` for a probability that is none, and where something is dropped without a seed.
pub(crate) fn dropout(arguments: DropoutArguments<'_, '_>) -> PyResult<Option<Dropout>> {
    let seed = match (arguments.number()?, arguments.seed) {
        (Some(number), _) => number,
        (None, Some(tensor)) => TensorView::<Int64>::new("seed", tensor)?.seed()?,
        (None, None) => 0,
    };
    arguments.checked(Dropout::new(arguments.p, seed).map_err(gate::to_python)?)
}
