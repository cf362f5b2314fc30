//! Which instruction set runs the kernels. Every level gives the same bits.
//!
//! A kernel is written once, over `Simd`: sixteen float32 numbers and eight 64-bit words at a time. `Level::run` compiles
//! it for each instruction set, inside a function that has that set's target features, and calls the one that was asked for.
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod elementary;
pub(crate) mod feed_forward;
pub(crate) mod keep;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod norm;
pub(crate) mod returns;
pub(crate) mod rotary;
pub(crate) mod token_statistics;
pub(crate) mod two_layer;
pub(crate) mod value_head;
pub(crate) mod value_head_backward;
mod vector;

pub(crate) use vector::{Lanes, Simd, WIDTH};

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
    const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Neon];

    /// The levels this processor can run, slowest first; never empty.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|level| level.is_available()).collect()
    }

    /// The fastest level this processor can run.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Self::Scalar)
    }

    /// Whether this processor can run this level.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[allow(unreachable_patterns, reason = "levels of other processors")]
            _ => false,
        }
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

    /// Runs `kernel` on this level, in plain Rust where the processor cannot.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            // SAFETY: the processor has the target features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if self.is_available() => unsafe { avx512::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if self.is_available() => unsafe { avx2::run(kernel) },
            // SAFETY: NEON is part of every AArch64 target of Rust.
            #[cfg(target_arch = "aarch64")]
            Self::Neon => unsafe { neon::run(kernel) },
            _ => kernel.run_scalar(),
        }
    }
}

/// A loop nest that every instruction set runs.
pub(crate) trait Kernel {
    /// Over vectors. `GROUPS` is how many [`Simd::F32`] accumulators fit the registers: it divides 16.
    ///
    /// Implementations are `#[inline(always)]`: only so does the code get the target features of its caller.
    fn run<S: Simd, const GROUPS: usize>(self, simd: S);
    /// In plain Rust, element by element.
    fn run_scalar(self);
}
