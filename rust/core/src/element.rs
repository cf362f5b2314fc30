//! The dtypes hidden states come in: float32, bfloat16, float16.
use crate::simd::Lanes;
pub use half::{bf16, f16};

/// A dtype of hidden states, weights and gradients: every crate above this one means these three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 4 bytes.
    Float32,
    /// 2 bytes.
    BFloat16,
    /// 2 bytes.
    Float16,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Float32, Self::BFloat16, Self::Float16];

    /// The name that torch, numpy and the CUDA kernels have for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }

    /// The dtype of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes of an element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::BFloat16 | Self::Float16 => 2,
        }
    }
}

/// One hidden-state element: exact conversion to float32, one rounding (to nearest, ties to even) back.
///
/// The kernels are written for these three; other crates cannot add a fourth.
pub trait Element: Copy + Send + Sync + Lanes + 'static {
    /// The dtype.
    const DTYPE: Dtype;
    /// Exact value in float32.
    fn to_f32(self) -> f32;
    /// Nearest value of this dtype.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::Float32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BFloat16;
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::Float16;
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Evaluates a body with `$element` as the type of the elements of a [`Dtype`].
///
/// ```
/// use vhead_core::{Dtype, Element, with_element};
///
/// let name = |dtype| with_element!(dtype, T => T::DTYPE.name());
/// assert_eq!(Dtype::ALL.map(name), ["float32", "bfloat16", "float16"]);
/// ```
#[macro_export]
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::Dtype::Float32 => {
                type $element = f32;
                $body
            }
            $crate::Dtype::BFloat16 => {
                type $element = $crate::element::bf16;
                $body
            }
            $crate::Dtype::Float16 => {
                type $element = $crate::element::f16;
                $body
            }
        }
    };
}
