//! The value head for candle: an op on `vhead-core`'s kernels, loaded from and saved to safetensors.
//!
//! A value head maps hidden states `[..., H]` to one float32 number a row (`[...]`), or to `K` of them (`[..., K]`).
//! Hidden states may be float32, bfloat16 or float16 and have any strides on their outer dimensions; weights are
//! float32. A row's value is the one that torch's `vhead.ops.value_head` gives, bit for bit.
//!
//! ```
//! use vhead_candle::ValueHead;
//! use vhead_candle::candle_core::{DType, Device, Tensor, Var};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let weight = Var::randn(0.0_f32, 0.02, (1, 64), &Device::Cpu)?;
//! let bias = Var::randn(0.0_f32, 0.02, 1, &Device::Cpu)?;
//! let head = ValueHead::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()))?;
//!
//! // [B, T, H] hidden states give [B, T] values.
//! let hidden = Tensor::randn(0.0_f32, 1.0, (2, 5, 64), &Device::Cpu)?.to_dtype(DType::BF16)?;
//! assert_eq!(head.forward(&hidden)?.dims(), [2, 5]);
//!
//! // Training: the dropout mask is a function of the seed, and gradients flow to the weights.
//! let gradients = head.forward_train(&hidden, 0.1, 42)?.sqr()?.mean_all()?.backward()?;
//! assert_eq!(gradients.get(&weight).map(Tensor::dims), Some([1, 64].as_slice()));
//!
//! // The file is the one that torch users know: `v_head.summary.weight` and `v_head.summary.bias`.
//! let path = std::env::temp_dir().join("vhead_candle_example.safetensors");
//! head.save(&path)?;
//! let same = ValueHead::load(&path, &Device::Cpu)?;
//! assert_eq!(same.weight().to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
//! # std::fs::remove_file(&path)?;
//! # Ok(())
//! # }
//! ```
//!
//! With the feature `cuda`, tensors on candle's CUDA devices are computed there, forward and backward, by `vhead-cuda`'s
//! kernels on the device's own stream, with the CPU's bits and the CPU's dropout mask. candle's part of that feature needs
//! nvcc to build; the kernels of this crate do not.
//!
//! On the CPU, work runs on an [`Executor`](vhead_core::Executor) of the caller's choice ([`ValueHead::with_executor`]),
//! never on rayon's global pool, which candle's own operations use and which does not survive `fork`.
mod error;
mod file;
mod value_head;
mod value_head_op;

pub use candle_core;
pub use error::{Error, Result};
pub use value_head::ValueHead;
pub use value_head_op::SharedExecutor;
pub use vhead_core;
