//! Everything that can go wrong between a device pointer and a launched kernel.

/// Why nothing was launched. Nothing is written to device memory when one of these is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver library on this machine.
    #[error("no CUDA driver: {0} was not found")]
    NoDriver(&'static str),
    /// The driver did not start.
    #[error("the CUDA driver does not start: {0}")]
    Start(Failure),
    /// The driver sees no device.
    #[error("the CUDA driver sees no device")]
    NoDevice,
    /// There are not so many devices.
    #[error("device: expected an ordinal below {count}, got {ordinal}")]
    Ordinal {
        /// What was asked for.
        ordinal: i32,
        /// How many devices there are.
        count: i32,
    },
    /// No image runs on the device.
    #[error(
        "no kernel image for {device} of compute capability {}.{}: there are {images}",
        capability.0, capability.1
    )]
    NoImage {
        /// Its name.
        device: String,
        /// Its compute capability.
        capability: (u32, u32),
        /// The images that there are.
        images: String,
    },
    /// The driver refuses an image.
    #[error("the CUDA driver {}.{} does not load image {image}: {failure}", driver / 1000, driver % 1000 / 10)]
    Load {
        /// Name of the image.
        image: &'static str,
        /// The newest CUDA version that the driver knows, as it says it: 12040 is 12.4.
        driver: i32,
        /// Its answer.
        failure: Failure,
    },
    /// An image's bytes cannot be decompressed: the build is damaged.
    #[error("image {0} is damaged")]
    Damaged(&'static str),
    /// The process was forked after CUDA had started in it.
    #[error(
        "CUDA had started before this process was forked, and does not survive that: start worker processes with the 'spawn' method"
    )]
    Forked,
    /// The device has no memory left for what the driver needs.
    #[error("out of device memory: {0}")]
    OutOfMemory(Failure),
    /// A kernel was not launched.
    #[error("{kernel} was not launched: {failure}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// The driver's answer.
        failure: Failure,
    },
    /// Another call of the driver failed.
    #[error("{0}")]
    Driver(Failure),
    /// A size that the kernels cannot count, or that the other arguments contradict.
    #[error("{what}: expected {expected}, got {actual}")]
    Size {
        /// Which argument.
        what: &'static str,
        /// What would have been right.
        expected: &'static str,
        /// What came.
        actual: u64,
    },
    /// An argument that `vhead-core` refuses as well.
    #[error("dropout probability must lie in [0, 1), got {0}")]
    Probability(String),
}

impl Error {
    /// Whether this machine or device has no kernels at all, now and later: callers then have another way to compute.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::NoDriver(_) | Self::Start(_) | Self::NoDevice | Self::NoImage { .. } | Self::Load { .. })
    }

    /// Whether the caller's arguments are at fault.
    #[must_use]
    pub fn is_argument(&self) -> bool {
        matches!(self, Self::Ordinal { .. } | Self::Size { .. } | Self::Probability(_))
    }
}

/// A driver function that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name} ({code}), {text}")]
pub struct Failure {
    /// The driver's function.
    pub call: &'static str,
    /// Its `CUresult`.
    pub code: u32,
    /// The code's name, as the driver gives it.
    pub name: String,
    /// The code's meaning, as the driver gives it.
    pub text: String,
}

/// A launch's result.
pub type Result<T> = std::result::Result<T, Error>;
