//! The dtypes hidden states come in: float32, bfloat16, float16.
use crate::simd::Lanes;
use half::{bf16, f16};

/// One hidden-state element: exact conversion to float32, one rounding (to nearest, ties to even) back.
///
/// The kernels are written for these three; other crates cannot add a fourth.
pub trait Element: Copy + Send + Sync + Lanes + 'static {
    /// The dtype's name as torch spells it.
    const NAME: &'static str;
    /// Exact value in float32.
    fn to_f32(self) -> f32;
    /// Nearest value of this dtype.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const NAME: &'static str = "float32";
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const NAME: &'static str = "bfloat16";
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for f16 {
    const NAME: &'static str = "float16";
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
