//! The value head as a candle op: on the CPU here, on CUDA devices in [`cuda`].
use crate::{Error, Result};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Storage, Tensor, WithDType, backend::BackendStorage,
};
use half::{bf16, f16};
use std::sync::Arc;
use vhead_core::{Dropout, Element, Executor, Gradients, Head, Rows, allocation};

#[cfg(feature = "cuda")]
mod cuda;

/// The dtypes of hidden states, for messages.
pub(crate) const HIDDEN_DTYPES: &str = "float32, bfloat16 or float16 (f32, bf16, f16)";
/// What messages call the first argument.
pub(crate) const HIDDEN: &str = "hidden states";

/// An executor that several heads and threads can hold.
pub type SharedExecutor = Arc<dyn Executor + Send + Sync>;

/// Hidden states `[..., H]`, weight `[K, H]` and perhaps bias `[K]` to values `[..., K]`, or `[...]` where `K` is 1.
#[derive(Clone)]
pub(crate) struct ValueHeadOp {
    pub(crate) dropout: Option<Dropout>,
    pub(crate) executor: SharedExecutor,
}

type View<'a> = (&'a CpuStorage, &'a Layout);
/// Gradients of hidden states, weight and bias, each where something depends on it.
type GradientTensors = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp2 for ValueHeadOp {
    fn name(&self) -> &'static str {
        "value_head"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.values((hidden, hidden_layout), (weight, weight_layout), None)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        hidden_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok(self.cuda_values((hidden, hidden_layout), (weight, weight_layout), None)?)
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _values: &Tensor,
        grad_values: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (hidden, weight, _) = self.gradients(hidden, weight, None, grad_values)?;
        Ok((hidden, weight))
    }
}

impl CustomOp3 for ValueHeadOp {
    fn name(&self) -> &'static str {
        "value_head"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.values((hidden, hidden_layout), (weight, weight_layout), Some((bias, bias_layout)))?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        hidden_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok(self.cuda_values((hidden, hidden_layout), (weight, weight_layout), Some((bias, bias_layout)))?)
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _values: &Tensor,
        grad_values: &Tensor,
    ) -> candle_core::Result<GradientTensors> {
        Ok(self.gradients(hidden, weight, Some(bias), grad_values)?)
    }
}

impl ValueHeadOp {
    fn values(&self, hidden: View<'_>, weight: View<'_>, bias: Option<View<'_>>) -> Result<(CpuStorage, Shape)> {
        let head = head(weight, bias)?;
        let values = match hidden.0.dtype() {
            DType::F32 => self.values_of::<f32>(hidden, &head),
            DType::BF16 => self.values_of::<bf16>(hidden, &head),
            DType::F16 => self.values_of::<f16>(hidden, &head),
            other => Err(Error::dtype(HIDDEN, HIDDEN_DTYPES, other)),
        }?;
        Ok((CpuStorage::F32(values), values_shape(hidden.1, head.outputs())))
    }

    fn values_of<T: Hidden>(&self, (storage, layout): View<'_>, head: &Head<'_>) -> Result<Vec<f32>> {
        let rows = rows::<T>(T::cpu_storage_as_slice(storage)?, layout)?;
        let mut values = allocation::zeros(rows.count().saturating_mul(head.outputs()))?;
        vhead_core::value_head(&rows, head, self.dropout.as_ref(), &mut values, &*self.executor)?;
        Ok(values)
    }

    fn gradients(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_values: &Tensor,
    ) -> Result<GradientTensors> {
        // candle hands over gradients as broadcasts too, for instance below a sum.
        let grad_values = contiguous(grad_values)?;
        #[cfg(feature = "cuda")]
        if hidden.device().is_cuda() {
            return self.cuda_gradients(hidden, weight, bias, &grad_values);
        }
        match hidden.dtype() {
            DType::F32 => self.gradients_of::<f32>(hidden, weight, bias, &grad_values),
            DType::BF16 => self.gradients_of::<bf16>(hidden, weight, bias, &grad_values),
            DType::F16 => self.gradients_of::<f16>(hidden, weight, bias, &grad_values),
            other => Err(Error::dtype(HIDDEN, HIDDEN_DTYPES, other)),
        }
    }

    fn gradients_of<T: Hidden>(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_values: &Tensor,
    ) -> Result<GradientTensors> {
        let wanted = |tensor: &Tensor| tensor.track_op().then(|| tensor.elem_count());
        let mut grad_hidden = wanted(hidden).map(allocation::zeros::<T>).transpose()?;
        let mut grad_weight = wanted(weight).map(allocation::zeros).transpose()?;
        let mut grad_bias = bias.and_then(wanted).map(allocation::zeros).transpose()?;
        let gradients = Gradients {
            hidden: grad_hidden.as_deref_mut(),
            weight: grad_weight.as_deref_mut(),
            bias: grad_bias.as_deref_mut(),
        };
        self.write_gradients::<T>(hidden, weight, grad_values, gradients)?;
        Ok((
            grad_hidden.map(|data| like(hidden, data)).transpose()?,
            grad_weight.map(|data| like(weight, data)).transpose()?,
            bias.zip(grad_bias).map(|(bias, data)| like(bias, data)).transpose()?,
        ))
    }

    fn write_gradients<T: Hidden>(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        grad_values: &Tensor,
        gradients: Gradients<'_, T>,
    ) -> Result<()> {
        let (hidden, hidden_layout) = hidden.storage_and_layout();
        let (weight, weight_layout) = weight.storage_and_layout();
        let (grad_values, grad_layout) = grad_values.storage_and_layout();
        let rows = rows(T::cpu_storage_as_slice(cpu(&hidden)?)?, hidden_layout)?;
        let head = head((cpu(&weight)?, weight_layout), None)?;
        let grad_values = floats("gradient of the values", (cpu(&grad_values)?, grad_layout))?;
        Ok(vhead_core::value_head_backward(
            &rows,
            &head,
            self.dropout.as_ref(),
            grad_values,
            gradients,
            &*self.executor,
        )?)
    }
}

/// The kernels' and candle's idea of a hidden-state dtype, together.
trait Hidden: Element + WithDType {}

impl<T: Element + WithDType> Hidden for T {}

fn like<T: WithDType>(tensor: &Tensor, data: Vec<T>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, tensor.shape(), tensor.device())?)
}

/// `[..., K]`, or `[...]` where `K` is 1, for hidden states `[..., H]`.
fn values_shape(hidden: &Layout, outputs: usize) -> Shape {
    let mut shape = hidden.dims().to_vec();
    shape.truncate(shape.len().saturating_sub(1));
    if outputs > 1 {
        shape.push(outputs);
    }
    shape.into()
}

/// A tensor in row-major order: itself where it has that, else a copy.
///
/// candle ends the process where there is no memory for the copy, as there never is for some broadcast sizes; so that much
/// is asked for first, and given back.
pub(crate) fn contiguous(tensor: &Tensor) -> Result<Tensor> {
    if tensor.device().is_cpu() && !tensor.is_contiguous() {
        let size = tensor.dtype().size_in_bytes();
        let bytes = tensor.dims().iter().fold(size, |bytes, size| bytes.saturating_mul(*size));
        drop(allocation::reserved::<u8>(bytes)?);
    }
    Ok(tensor.contiguous()?)
}

/// The CPU storage of a tensor.
pub(crate) fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    let actual = match storage {
        Storage::Cpu(storage) => return Ok(storage),
        Storage::Cuda(_) => "a CUDA device",
        Storage::Metal(_) => "a Metal device",
    };
    Err(Error::Device { what: "value_head", expected: "the CPU", actual })
}

/// Weight `[K, H]` and bias `[K]` as the kernels take them.
pub(crate) fn head<'a>(weight: View<'a>, bias: Option<View<'a>>) -> Result<Head<'a>> {
    let &[_, columns] = weight.1.dims() else {
        return Err(Error::Shape { what: "weight", expected: "[K, H]".to_owned(), actual: weight.1.dims().to_vec() });
    };
    let bias = bias.map(|bias| floats("bias", bias)).transpose()?;
    Ok(Head::new(floats("weight", weight)?, bias, columns)?)
}

pub(crate) fn floats<'a>(what: &'static str, (storage, layout): View<'a>) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else {
        return Err(Error::dtype(what, "float32 (f32)", storage.dtype()));
    };
    let range = layout.contiguous_offsets().and_then(|(start, end)| data.get(start..end));
    range.ok_or_else(|| strides(what, "a contiguous tensor", layout))
}

/// Hidden states `[..., H]` where they lie: outer strides are walked, the last dimension must be contiguous.
fn rows<'a, T: Element>(data: &'a [T], layout: &Layout) -> Result<Rows<'a, T>> {
    let (columns, sizes, outer) = walk(layout, data.len())?;
    let outer: Vec<isize> = outer.iter().map(|stride| stride.cast_signed()).collect();
    let start = data.as_ptr().wrapping_add(layout.start_offset());
    // SAFETY: candle's strides are not negative, so the farthest element is the last of each dimension; `walk` has found
    // it inside `data`, which is borrowed for as long as the rows are.
    Ok(unsafe { Rows::from_raw(start, sizes, &outer, columns) })
}

/// Elements of a row, and the sizes and strides of the outer dimensions, of a layout that stays inside `length` elements.
fn walk(layout: &Layout, length: usize) -> Result<(usize, &[usize], &[usize])> {
    let (Some((&columns, sizes)), Some((&step, outer))) = (layout.dims().split_last(), layout.stride().split_last())
    else {
        return Err(Error::Shape { what: HIDDEN, expected: "[..., H]".to_owned(), actual: Vec::new() });
    };
    let fits = reach(layout).is_some_and(|reach| reach <= length);
    if !fits || (columns > 1 && step != 1) {
        return Err(strides(HIDDEN, "a contiguous last dimension inside the storage", layout));
    }
    Ok((columns, sizes, outer))
}

/// One past the farthest element that a layout reads; `None` where that does not fit a `usize`.
fn reach(layout: &Layout) -> Option<usize> {
    if layout.dims().contains(&0) {
        return Some(0);
    }
    let mut dimensions = layout.dims().iter().zip(layout.stride());
    let start = layout.start_offset().checked_add(1);
    dimensions.try_fold(start?, |reach, (size, stride)| reach.checked_add((size - 1).checked_mul(*stride)?))
}

fn strides(what: &'static str, expected: &'static str, layout: &Layout) -> Error {
    Error::Strides { what, expected, sizes: layout.dims().to_vec(), strides: layout.stride().to_vec() }
}

#[cfg(test)]
mod tests;
