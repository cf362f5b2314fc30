//! The head itself: two tensors, and who runs the work.
use crate::value_head_op::{self as op, SharedExecutor, ValueHeadOp};
use crate::{Error, Result, file};
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use std::sync::Arc;
use vhead_core::threads::{Pool, available_cores};
use vhead_core::{Dropout, Element, Rows, allocation};

/// A linear value head: weight `[K, H]` and perhaps bias `[K]`, float32, on one device.
#[derive(Clone)]
pub struct ValueHead {
    weight: Tensor,
    bias: Option<Tensor>,
    executor: SharedExecutor,
}

impl ValueHead {
    /// A head of these tensors; pass a [`Var`](candle_core::Var)'s tensor to have it trained.
    ///
    /// # Errors
    /// [`Error::Dtype`] unless both are float32, [`Error::Shape`] unless they are `[K, H]` and `[K]` with neither zero.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let outputs = match *weight.dims() {
            [outputs, columns] if outputs > 0 && columns > 0 => outputs,
            _ => return Err(shape("weight", "[K, H] of at least one row and column".to_owned(), &weight)),
        };
        check_float32("weight", &weight)?;
        if let Some(bias) = &bias {
            check_float32("bias", bias)?;
            if bias.dims() != [outputs] {
                return Err(shape("bias", format!("[{outputs}]"), bias));
            }
        }
        let bias = bias.as_ref().map(op::contiguous).transpose()?;
        Ok(Self { weight: op::contiguous(&weight)?, bias, executor: Arc::new(Pool::new(available_cores())) })
    }

    /// The same head, run by `executor` instead of a pool of as many threads as this process may use.
    #[must_use]
    pub fn with_executor(self, executor: SharedExecutor) -> Self {
        Self { executor, ..self }
    }

    /// The head in a safetensors file, which is memory-mapped: a whole language model may lie beside the head.
    ///
    /// Takes `v_head.summary.weight` and `.bias` (a model with a value head), `summary.*` (a value head alone), or
    /// `weight` and perhaps `bias` (a linear layer alone). bfloat16 and float16 are widened to float32, exactly.
    ///
    /// # Errors
    /// [`Error::File`], around what is wrong: [`Error::Io`], [`Error::Format`], [`Error::Header`], [`Error::Keys`],
    /// [`Error::Settings`], [`Error::Tensor`], or [`Error::Kernel`] where there is no memory for the head.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let checked = |bytes: memmap2::Mmap| {
            let head = Self::from_bytes(&bytes, device)?;
            file::check_configuration(path, &bytes)?;
            Ok(head)
        };
        file::map(path).and_then(checked).map_err(Error::in_file(path))
    }

    /// [`load`](Self::load) from the bytes of such a file.
    ///
    /// # Errors
    /// As [`load`](Self::load), but for the file's.
    pub fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self> {
        let file::Parameters { weight, bias, outputs, columns } = file::parse(bytes)?;
        let bias = bias.map(|bias| Tensor::from_vec(bias, outputs, device)).transpose()?;
        Self::new(Tensor::from_vec(weight, (outputs, columns), device)?, bias)
    }

    /// Writes the head as `v_head.summary.weight` and `v_head.summary.bias`, the way `safetensors.torch` does.
    ///
    /// The file is written beside `path` and renamed. In that format a head has a bias, so one without it is saved with
    /// zeros, which changes no value.
    ///
    /// # Errors
    /// [`Error::File`] around an [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.to_bytes().and_then(|bytes| file::replace(path, &bytes)).map_err(Error::in_file(path))
    }

    /// The bytes that [`save`](Self::save) writes.
    ///
    /// # Errors
    /// [`Error::Candle`] where the tensors cannot be read back from their device, [`Error::Kernel`] where there is no memory
    /// for them.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let weight = numbers(&self.weight)?;
        let bias = match &self.bias {
            Some(bias) => numbers(bias)?,
            None => allocation::zeros(self.out_features())?,
        };
        file::serialize(&weight, &bias, self.in_features())
    }

    /// The value of each row, without dropout: hidden states `[..., H]` to float32 `[...]`, or `[..., K]` where `K > 1`.
    ///
    /// Outer dimensions may have any strides; a last dimension that is not contiguous is copied first. Gradients flow
    /// to whichever of hidden states, weight and bias is tracked; nothing but those three is kept for them.
    ///
    /// # Errors
    /// [`Error::Shape`] where the last dimension is not `H`, [`Error::Dtype`] for other dtypes, [`Error::Candle`] on
    /// another device than the head's, or on one that this build has no kernels for.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        self.apply(hidden, None)
    }

    /// [`forward`](Self::forward) with dropout of probability `p` on the hidden states.
    ///
    /// The mask is a function of `seed` and the element's row and column ([`vhead_core::dropout`]): take a new seed for
    /// each step. It is never stored; backward makes it again.
    ///
    /// # Errors
    /// As `forward`, and [`Error::Kernel`] unless `0 <= p < 1`.
    pub fn forward_train(&self, hidden: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
        self.apply(hidden, Dropout::new(p, seed)?)
    }

    /// Writes the value of each row to `values` (`[N, K]` row-major), without a candle tensor around the hidden states:
    /// for memory that numpy, torch or anybody else owns.
    ///
    /// # Errors
    /// [`Error::Device`] unless the head is on the CPU, [`Error::Kernel`] where widths or lengths do not fit.
    pub fn forward_rows<T: Element>(&self, hidden: &Rows<'_, T>, values: &mut [f32]) -> Result<()> {
        let (weight, layout) = self.weight.storage_and_layout();
        let weight = (op::cpu(&weight)?, layout);
        let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &bias {
            Some((storage, layout)) => Some((op::cpu(storage)?, *layout)),
            None => None,
        };
        Ok(vhead_core::value_head(hidden, &op::head(weight, bias)?, None, values, &*self.executor)?)
    }

    /// Weight, `[K, H]`.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Bias, `[K]`.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Elements in a row of hidden states: `H`.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }

    /// Numbers a row: `K`, 1 for a critic.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Where weight and bias are.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.weight.device()
    }

    fn apply(&self, hidden: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        if hidden.dims().last() != Some(&self.in_features()) {
            return Err(shape(op::HIDDEN, format!("[..., {}]", self.in_features()), hidden));
        }
        if !matches!(hidden.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            return Err(Error::dtype(op::HIDDEN, op::HIDDEN_DTYPES, hidden.dtype()));
        }
        let hidden = if hidden.stride().last() == Some(&1) { hidden.clone() } else { op::contiguous(hidden)? };
        let op = ValueHeadOp { dropout, executor: self.executor.clone() };
        Ok(match &self.bias {
            Some(bias) => hidden.apply_op3(&self.weight, bias, op)?,
            None => hidden.apply_op2(&self.weight, op)?,
        })
    }
}

impl candle_core::Module for ValueHead {
    fn forward(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward(hidden)?)
    }
}

impl std::fmt::Debug for ValueHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ValueHead")
            .field("in_features", &self.in_features())
            .field("out_features", &self.out_features())
            .field("bias", &self.bias.is_some())
            .field("device", &self.device().location())
            .field("threads", &self.executor.threads())
            .finish()
    }
}

/// A float32 tensor's elements in row-major order, for a tensor that has them so.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    let (storage, layout) = tensor.storage_and_layout();
    match op::cpu(&storage) {
        Ok(storage) => {
            let numbers = op::floats("head", (storage, layout))?;
            Ok(allocation::collected(numbers.len(), numbers.iter().copied())?)
        }
        Err(_) => Ok(tensor.flatten_all()?.to_vec1()?),
    }
}

fn check_float32(what: &'static str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F32 => Ok(()),
        other => Err(Error::dtype(what, "float32 (f32)", other)),
    }
}

fn shape(what: &'static str, expected: String, tensor: &Tensor) -> Error {
    Error::Shape { what, expected, actual: tensor.dims().to_vec() }
}
