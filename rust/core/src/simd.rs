//! Which instruction set runs the kernels. Every level gives the same bits.

/// An instruction set the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Level {
    /// Plain Rust.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AArch64 with NEON.
    Neon,
}

impl Level {
    /// The levels this processor can run, slowest first; never empty.
    #[must_use]
    pub fn available() -> Vec<Self> {
        vec![Self::Scalar]
    }

    /// The fastest level this processor can run.
    #[must_use]
    pub fn best() -> Self {
        Self::Scalar
    }

    /// Lower-case name, as printed by `vhead env`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }
}
