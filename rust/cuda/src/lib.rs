//! The value head on CUDA devices: device pointers and a stream in, launched kernels out. No Python, no torch, no candle.
//!
//! The kernels (`kernels/`, CUDA C++) follow `vhead_core`'s order of additions and its dropout mask, so that a value and a
//! gradient have the bits that the CPU gives. They are compiled ahead (`images/`) and embedded; nothing of CUDA is linked.
//! The driver library is opened at run time, on the first call, and its absence is an error like any other.
//!
//! ```
//! match vhead_cuda::Device::get(0) {
//!     Ok(device) => assert!(vhead_cuda::images().any(|image| image == device.image())),
//!     Err(error) => assert!(error.is_absence(), "{error}"),
//! }
//! ```
//!
//! The launches are asynchronous, in the device's primary context, which torch and the CUDA runtime use as well, and leave
//! the calling thread's current context as it was. They allocate nothing and wait for nothing, so that a CUDA graph can
//! capture them; [`Device::get`] loads the kernels and must have been called before a capture begins.
mod arguments;
mod device;
mod driver;
mod error;
mod images;
mod kernels;
mod rows;
mod token_statistics;
mod value_head;
mod value_head_backward;

pub use arguments::{DeviceDropout, DeviceHead, Seed};
pub use device::{Description, Device, Stream, describe, device_count};
pub use driver::{driver_version, is_emulated, takes_host_memory};
pub use error::{Error, Failure, Result};
pub use images::{Capability, images};
pub use rows::DeviceRows;
pub use token_statistics::{
    DeviceLogits, DeviceRowGradients, DeviceSelected, DeviceSelection, DeviceStatistics, ROW_STATE_BYTES,
};
pub use value_head_backward::{DeviceGradients, WeightGradient, partials};
