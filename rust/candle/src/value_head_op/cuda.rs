//! The value head on CUDA devices: `vhead-cuda`'s kernels, launched on the stream of candle's device.
//!
//! candle's device and `vhead-cuda`'s are one: both are in the primary context. Memory is candle's, allocated and freed on
//! that stream.
use super::{GradientTensors, HIDDEN, HIDDEN_DTYPES, ValueHeadOp, strides, values_shape};
use crate::{Error, Result};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};
use candle_core::cuda::{CudaDType, CudaDevice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, DeviceLocation, Layout, Shape, Storage, Tensor};
use half::{bf16, f16};
use std::sync::Arc;
use vhead_core::{Dropout, Element};
use vhead_cuda::{Device, DeviceDropout, DeviceGradients, DeviceHead, DeviceRows, Seed, Stream, WeightGradient};

type View<'a> = (&'a CudaStorage, &'a Layout);

/// A hidden-state dtype as candle and the kernels know it.
trait OnDevice: Element + CudaDType + DeviceRepr {}

impl<T: Element + CudaDType + DeviceRepr> OnDevice for T {}

impl ValueHeadOp {
    /// `cuda_fwd` of both traits.
    pub(super) fn cuda_values(
        &self,
        hidden: View<'_>,
        weight: View<'_>,
        bias: Option<View<'_>>,
    ) -> Result<(CudaStorage, Shape)> {
        match hidden.0.dtype() {
            DType::F32 => self.cuda_values_of::<f32>(hidden, weight, bias),
            DType::BF16 => self.cuda_values_of::<bf16>(hidden, weight, bias),
            DType::F16 => self.cuda_values_of::<f16>(hidden, weight, bias),
            other => Err(Error::dtype(HIDDEN, HIDDEN_DTYPES, other)),
        }
    }

    fn cuda_values_of<T: OnDevice>(
        &self,
        hidden: View<'_>,
        weight: View<'_>,
        bias: Option<View<'_>>,
    ) -> Result<(CudaStorage, Shape)> {
        let queue = Queue::of(hidden.0.device())?;
        let (rows, _hidden) = queue.rows::<T>(hidden)?;
        let (head, _weight) = queue.head(weight, &rows)?;
        let (bias, _bias) = match bias {
            Some(bias) => queue.floats("bias", bias, head.outputs.into()).map(|(bias, guard)| (bias, Some(guard)))?,
            None => (0, None),
        };
        let mut values = queue.room::<f32>(rows.count() * u64::from(head.outputs))?;
        {
            let (address, _values) = values.device_ptr_mut(&queue.stream);
            // SAFETY: the storages are of this device, and their layouts have been checked to stay inside them; the guards
            // order this launch after what wrote them.
            unsafe {
                let head = DeviceHead { bias, ..head };
                queue.device.value_head(queue.handle(), &rows, &head, self.device_dropout()?.as_ref(), address)?;
            }
        }
        let outputs = weight.1.dims().first().copied().unwrap_or(0);
        Ok((f32::wrap_cuda_slice(values, queue.owner.clone()), values_shape(hidden.1, outputs)))
    }

    /// [`ValueHeadOp::gradients`] on a CUDA device.
    pub(super) fn cuda_gradients(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_values: &Tensor,
    ) -> Result<GradientTensors> {
        match hidden.dtype() {
            DType::F32 => self.cuda_gradients_of::<f32>(hidden, weight, bias, grad_values),
            DType::BF16 => self.cuda_gradients_of::<bf16>(hidden, weight, bias, grad_values),
            DType::F16 => self.cuda_gradients_of::<f16>(hidden, weight, bias, grad_values),
            other => Err(Error::dtype(HIDDEN, HIDDEN_DTYPES, other)),
        }
    }

    fn cuda_gradients_of<T: OnDevice>(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_values: &Tensor,
    ) -> Result<GradientTensors> {
        let (hidden_storage, hidden_layout) = hidden.storage_and_layout();
        let (weight_storage, weight_layout) = weight.storage_and_layout();
        let (grad_storage, grad_layout) = grad_values.storage_and_layout();
        let hidden_view = (on_cuda(&hidden_storage)?, hidden_layout);
        let queue = Queue::of(hidden_view.0.device())?;
        let (rows, _hidden) = queue.rows::<T>(hidden_view)?;
        let (head, _weight) = queue.head((on_cuda(&weight_storage)?, weight_layout), &rows)?;
        let count = rows.count() * u64::from(head.outputs);
        let grad_view = (on_cuda(&grad_storage)?, grad_layout);
        let (grad_address, _grad) = queue.floats("gradient of the values", grad_view, count)?;
        let mut gradients = Gradients::<T> {
            hidden: queue.gradient(hidden)?,
            weight: queue.gradient(weight)?,
            partials: match weight.track_op() {
                true => Some(queue.room(vhead_cuda::partials(&rows, head.outputs))?),
                false => None,
            },
            bias: bias.map(|bias| queue.gradient(bias)).transpose()?.flatten(),
        };
        {
            let (addresses, _guards) = gradients.addresses(&queue.stream);
            let dropout = self.device_dropout()?;
            // SAFETY: as in the forward pass; the gradients are new and as long as the kernels write.
            unsafe {
                queue.device.value_head_backward(
                    queue.handle(),
                    &rows,
                    &head,
                    dropout.as_ref(),
                    grad_address,
                    &addresses,
                )?;
            }
        }
        Ok((
            gradients.hidden.map(|data| queue.tensor(data, hidden.shape())),
            gradients.weight.map(|data| queue.tensor(data, weight.shape())),
            bias.zip(gradients.bias).map(|(bias, data)| queue.tensor(data, bias.shape())),
        ))
    }

    fn device_dropout(&self) -> Result<Option<DeviceDropout>> {
        // The threshold is the probability in steps of 1/65536, so that the same one comes out.
        let of = |rule: &Dropout| DeviceDropout::new(f64::from(rule.threshold()) / 65536.0, Seed::Value(rule.seed()));
        Ok(self.dropout.as_ref().map(of).transpose()?.flatten())
    }
}

/// The memory of the gradients, each where something depends on it.
struct Gradients<T> {
    hidden: Option<CudaSlice<T>>,
    weight: Option<CudaSlice<f32>>,
    partials: Option<CudaSlice<f32>>,
    bias: Option<CudaSlice<f32>>,
}

impl<T> Gradients<T> {
    /// Where they are, and what keeps other streams from them until the work has been sent.
    fn addresses<'a>(&'a mut self, stream: &'a CudaStream) -> (DeviceGradients, [Option<SyncOnDrop<'a>>; 4]) {
        let (hidden, hidden_guard) = address(self.hidden.as_mut(), stream);
        let (weight, weight_guard) = address(self.weight.as_mut(), stream);
        let (partials, partials_guard) = address(self.partials.as_mut(), stream);
        let (bias, bias_guard) = address(self.bias.as_mut(), stream);
        let weight = weight.zip(partials).map(|(address, partials)| WeightGradient { address, partials });
        (DeviceGradients { hidden, weight, bias }, [hidden_guard, weight_guard, partials_guard, bias_guard])
    }
}

fn address<'a, T>(
    slice: Option<&'a mut CudaSlice<T>>,
    stream: &'a CudaStream,
) -> (Option<u64>, Option<SyncOnDrop<'a>>) {
    slice.map(|slice| slice.device_ptr_mut(stream)).unzip()
}

/// Where work goes: candle's device and stream, and the kernels of that device.
struct Queue<'a> {
    owner: &'a CudaDevice,
    stream: Arc<CudaStream>,
    device: &'static Device,
}

impl<'a> Queue<'a> {
    fn of(owner: &'a CudaDevice) -> Result<Self> {
        let ordinal = match owner.location() {
            DeviceLocation::Cuda { gpu_id } => i32::try_from(gpu_id).unwrap_or(i32::MAX),
            DeviceLocation::Cpu | DeviceLocation::Metal { .. } => return Err(elsewhere("another device")),
        };
        Ok(Self { owner, stream: owner.cuda_stream(), device: Device::get(ordinal)? })
    }

    fn handle(&self) -> Stream {
        Stream(self.stream.cu_stream().expose_provenance())
    }

    /// Hidden states `[..., H]` where they lie.
    fn rows<'s, T: OnDevice>(
        &'s self,
        (storage, layout): (&'s CudaStorage, &Layout),
    ) -> Result<(DeviceRows, SyncOnDrop<'s>)> {
        let slice = T::as_cuda_slice(storage)?;
        let (columns, sizes, outer) = super::walk(layout, slice.len())?;
        let sizes: Vec<u64> = sizes.iter().map(|&size| size as u64).collect();
        let outer: Vec<i64> = outer.iter().map(|&stride| stride as i64).collect();
        let (start, guard) = slice.device_ptr(&self.stream);
        let start = start + (layout.start_offset() * size_of::<T>()) as u64;
        Ok((DeviceRows::new(start, T::DTYPE, &sizes, &outer, columns as u64)?, guard))
    }

    /// Weight `[K, H]` for these rows, without a bias.
    fn head<'s>(
        &'s self,
        weight: (&'s CudaStorage, &Layout),
        rows: &DeviceRows,
    ) -> Result<(DeviceHead, SyncOnDrop<'s>)> {
        let columns = u64::from(rows.columns());
        let outputs = match *weight.1.dims() {
            [outputs, width] if width as u64 == columns => u32::try_from(outputs).ok(),
            _ => None,
        };
        let Some(outputs) = outputs else {
            let expected = format!("[K, {columns}]");
            return Err(Error::Shape { what: "weight", expected, actual: weight.1.dims().to_vec() });
        };
        let (address, guard) = self.floats("weight", weight, columns * u64::from(outputs))?;
        Ok((DeviceHead { weight: address, bias: 0, outputs }, guard))
    }

    /// `count` contiguous float32 numbers.
    fn floats<'s>(
        &'s self,
        what: &'static str,
        (storage, layout): (&'s CudaStorage, &Layout),
        count: u64,
    ) -> Result<(u64, SyncOnDrop<'s>)> {
        if storage.dtype() != DType::F32 {
            return Err(Error::dtype(what, "float32 (f32)", storage.dtype()));
        }
        let slice = f32::as_cuda_slice(storage)?;
        let fits = |&(start, end): &(usize, usize)| (end - start) as u64 == count && end <= slice.len();
        let Some((start, _)) = layout.contiguous_offsets().filter(fits) else {
            return Err(strides(what, "a contiguous tensor of the kernels' size", layout));
        };
        let (address, guard) = slice.device_ptr(&self.stream);
        Ok((address + (start * size_of::<f32>()) as u64, guard))
    }

    /// Memory for a tensor's gradient, where something depends on it.
    fn gradient<T: OnDevice>(&self, tensor: &Tensor) -> Result<Option<CudaSlice<T>>> {
        tensor.track_op().then(|| self.room(tensor.elem_count() as u64)).transpose()
    }

    /// Memory for `count` elements that something is about to write; the driver gives none for none.
    fn room<T: DeviceRepr>(&self, count: u64) -> Result<CudaSlice<T>> {
        let count = usize::try_from(count).unwrap_or(usize::MAX).max(1);
        // SAFETY: whatever is read of it will have been written by the kernels first.
        Ok(unsafe { self.owner.alloc(count) }?)
    }

    fn tensor<T: OnDevice>(&self, data: CudaSlice<T>, shape: &Shape) -> Tensor {
        let storage = Storage::Cuda(T::wrap_cuda_slice(data, self.owner.clone()));
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }
}

fn on_cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        Storage::Cpu(_) => Err(elsewhere("the CPU")),
        Storage::Metal(_) => Err(elsewhere("a Metal device")),
    }
}

fn elsewhere(actual: &'static str) -> Error {
    Error::Device { what: "value_head", expected: "the CUDA device of the hidden states", actual }
}

#[cfg(test)]
mod tests;
