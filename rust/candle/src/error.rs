//! Everything that can be wrong with a head, its file or its hidden states, as one enum.
use candle_core::DType;
use std::path::{Path, PathBuf};

/// Why a head could not be made, loaded, saved or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has a dtype that the head does not take.
    #[error("{what}: expected {expected}, got {actual}")]
    Dtype {
        /// Which tensor.
        what: &'static str,
        /// The dtypes that it may have.
        expected: &'static str,
        /// The dtype that came.
        actual: &'static str,
    },
    /// A tensor has a shape that the head does not take.
    #[error("{what}: expected shape {expected}, got {actual:?}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// The shape, with letters for free sizes.
        expected: String,
        /// The shape that came.
        actual: Vec<usize>,
    },
    /// A tensor's strides are not ones that the kernels can walk.
    #[error("{what}: expected {expected}, got shape {sizes:?} with strides {strides:?}")]
    Strides {
        /// Which tensor.
        what: &'static str,
        /// The strides that it may have.
        expected: &'static str,
        /// Its shape.
        sizes: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
    },
    /// The tensors are on a device that they cannot be used on.
    #[error("{what}: expected tensors on {expected}, got some on {actual}")]
    Device {
        /// What was to be run.
        what: &'static str,
        /// Where it runs in this build.
        expected: &'static str,
        /// Where the tensors are.
        actual: &'static str,
    },
    /// No head, half a head or several heads among the tensors of a file.
    #[error("expected {expected}, found {}", list(found))]
    Keys {
        /// The names that make a head.
        expected: String,
        /// The names in the file.
        found: Vec<String>,
    },
    /// A tensor of a file has the right name but is no part of a head.
    #[error("tensor `{name}`: expected {expected}, found {found}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// Its shape or dtype in a head.
        expected: String,
        /// Its shape or dtype here.
        found: String,
    },
    /// The head in a file is more than a projection.
    #[error("{place}: expected a head whose outputs are its values, found one with {found}; vhead.ValueHead reads it")]
    Settings {
        /// What states them: the file's metadata, or the configuration beside it.
        place: &'static str,
        /// The settings, as they are stated.
        found: String,
    },
    /// Bytes that are not a whole safetensors file.
    #[error("not a safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// The list of a safetensors file's tensors is longer than any checkpoint's.
    #[error("not a safetensors file: expected a header of at most {most} bytes, got {actual}")]
    Header {
        /// Its length.
        actual: u64,
        /// The longest that is read.
        most: u64,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// One of the above, in a file.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Self>,
    },
    /// The kernels refused their arguments.
    #[error(transparent)]
    Kernel(#[from] vhead_core::Error),
    /// A CUDA device has no kernels, or refused a launch.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] vhead_cuda::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn in_file(path: &Path) -> impl FnOnce(Self) -> Self {
        let path = path.to_owned();
        |source| Self::File { path, source: Box::new(source) }
    }

    pub(crate) fn dtype(what: &'static str, expected: &'static str, actual: DType) -> Self {
        Self::Dtype { what, expected, actual: actual.as_str() }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            // No kind of error of this crate is one of candle's, whichever comes: candle has a wrapper for all others.
            error => Self::wrap(error),
        }
    }
}

/// The shortest names first: a head's are short, and a language model has hundreds of long ones.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.sort_unstable_by_key(|name| (name.len(), *name));
    match names.len() {
        0 => "no tensors".to_owned(),
        count if count <= SHOWN => names.join(", "),
        count => format!("{} and {} more", names[..SHOWN].join(", "), count - SHOWN),
    }
}
