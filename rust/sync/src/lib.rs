//! Weights handed from a trainer to its workers through a directory: published whole, verified before they are used, or
//! not at all.
//!
//! A publication is a folder `step-00000120` of safetensors files and a manifest. It is written beside its place, flushed
//! to disk, renamed, and then named by `LATEST`, which is replaced in one step. [`Publisher`] writes publications;
//! [`Stage`] reads one, verifies every byte of it in memory or in a file of its own that nobody else can reach, and
//! only then copies it over the weights in use.
//!
//! This crate knows neither Python nor torch: weights are names, dtypes, shapes and bytes.

mod blocks;
mod digest;
mod draft;
mod error;
mod folder;
mod latest;
mod manifest;
mod publisher;
mod retention;
mod slime;
mod source;
mod stage;
mod store;
mod tensors;

pub use digest::Digest;
pub use error::{Error, Result};
pub use latest::{Latest, folder_of};
pub use manifest::{Kind, Manifest};
pub use publisher::{Publisher, Settings};
pub use retention::{Collected, Listed, collect, list};
pub use slime::{Checksum, export};
pub use stage::{Have, Places, Stage, Staged, Target};
pub use tensors::Description;
