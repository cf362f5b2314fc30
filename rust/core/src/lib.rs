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
mod backward;
mod buffer;
pub mod dropout;
pub mod element;
mod error;
mod forward;
pub mod init;
pub mod philox;
pub mod reduce;
pub mod reference;
pub mod rows;
pub mod simd;
pub mod threads;

pub use backward::{CHUNK, Gradients, SLOTS, backward, backward_with};
pub use dropout::Dropout;
pub use element::Element;
pub use error::{Error, Result};
pub use forward::{Head, forward, forward_with};
pub use rows::Rows;
pub use simd::Level;
pub use threads::{Executor, Pool, Serial};
