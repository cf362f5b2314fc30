//! The value head's arithmetic on plain slices: no Python, no torch, no candle.
//!
//! A value head maps each row of hidden states to `K` numbers (`K` is 1 for a critic):
//! `value[n, k] = bias[k] + scale * sum_h keep(n, h) * hidden[n, h] * weight[k, h]`.
//!
//! Three promises hold on every backend that follows this crate, and the tests hold them here:
//!
//! * a row's value depends on that row, the weights and `H` alone ([`reduce`] fixes the order of additions);
//! * the dropout mask is a function of (seed, row, column), never stored ([`dropout`]);
//! * hidden states are read in their own dtype and accumulated in float32 ([`element`]).
//!
//! ```
//! use vhead_core::{Head, Pool, Rows, value_head};
//!
//! let hidden = [0.5_f32, -1.0, 2.0, 1.5, 0.25, -0.75]; // [2, 3]
//! let mut values = [0.0; 2];
//! let head = Head::new(&[0.1, 0.2, 0.3], Some(&[1.0]), 3)?;
//! value_head(&Rows::contiguous(&hidden, 2, 3)?, &head, None, &mut values, &Pool::new(2))?;
//! assert!((values[0] - 1.45).abs() < 1e-6 && (values[1] - 0.975).abs() < 1e-6);
//! # Ok::<(), vhead_core::Error>(())
//! ```
//!
//! Kernels are written once, over vectors ([`simd`]), and run on threads of the caller's choice ([`threads`]); neither
//! changes a bit of a result.
pub mod allocation;
mod attention;
mod buffer;
pub mod dropout;
pub mod element;
mod error;
pub mod feed_forward;
mod head;
pub mod init;
mod logits_rule;
mod math;
pub mod matrix_unit;
mod norm;
pub mod philox;
pub mod processor;
pub mod reduce;
pub mod reference;
pub mod returns;
mod rotary;
mod row_state;
pub mod rows;
pub mod simd;
pub mod threads;
mod token_selection;
pub mod token_statistics;
pub mod token_statistics_backward;
mod two_layer;
mod value_head;
mod value_head_backward;

pub use attention::{Attention, Visibility};
pub use dropout::Dropout;
pub use element::{Dtype, Element};
pub use error::{Error, Place, Result};
pub use feed_forward::FeedForward;
pub use head::Head;
pub use logits_rule::LogitsRule;
pub use norm::rms_norm;
pub use rotary::rotate;
pub use row_state::BLOCK as LOGITS_BLOCK;
pub use rows::Rows;
pub use simd::Level;
pub use threads::{Executor, Pool, Serial};
pub use token_statistics::{LogitStatistics, Selected, Statistics};
pub use token_statistics_backward::{LogitGradients, ProductGradients};
pub use two_layer::{Linear, TwoLayerHead, apply_dropout, linear, linear_with, two_layer, two_layer_with};
pub use value_head::{value_head, value_head_with};
pub use value_head_backward::{CHUNK, Gradients, SLOTS, value_head_backward, value_head_backward_with};
