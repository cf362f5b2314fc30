//! What tensors consist of where they cross this boundary: the kernels' three float dtypes, and torch's int64.
use crate::dlpack;
use vhead_core::Dtype;

/// One of torch's dtypes that this package knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    /// Hidden states, weights, gradients.
    Float(Dtype),
    /// Token ids and seeds.
    Int64,
}

impl Scalar {
    pub(crate) const FLOATS: [Self; 3] =
        [Self::Float(Dtype::Float32), Self::Float(Dtype::BFloat16), Self::Float(Dtype::Float16)];
    pub(crate) const ALL: [Self; 4] =
        [Self::Float(Dtype::Float32), Self::Float(Dtype::BFloat16), Self::Float(Dtype::Float16), Self::Int64];

    /// torch's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Float(dtype) => dtype.name(),
            Self::Int64 => "int64",
        }
    }

    /// DLPack's description of it.
    pub(crate) fn dlpack(self) -> dlpack::DataType {
        let (code, bits) = match self {
            Self::Float(Dtype::Float32) => (2, 32),
            Self::Float(Dtype::BFloat16) => (4, 16),
            Self::Float(Dtype::Float16) => (2, 16),
            Self::Int64 => (0, 64),
        };
        dlpack::DataType { code, bits, lanes: 1 }
    }

    /// The dtype that DLPack describes so, if it is one of ours.
    pub(crate) fn from_dlpack(dtype: dlpack::DataType) -> Option<Self> {
        Self::ALL.into_iter().find(|candidate| candidate.dlpack() == dtype)
    }
}

/// What an argument may consist of. A view has the kind as its type, so that no kernel meets a dtype that it cannot read.
pub(crate) trait Kind: Copy + std::fmt::Debug {
    /// In the order in which errors list them.
    const EXPECTED: &'static [Scalar];
    /// The kind, where `scalar` is of it.
    fn of(scalar: Scalar) -> Option<Self>;
    /// What a new tensor of this kind consists of.
    fn scalar(self) -> Scalar;
}

impl Kind for Dtype {
    const EXPECTED: &'static [Scalar] = &Scalar::FLOATS;

    fn of(scalar: Scalar) -> Option<Self> {
        match scalar {
            Scalar::Float(dtype) => Some(dtype),
            Scalar::Int64 => None,
        }
    }

    fn scalar(self) -> Scalar {
        Scalar::Float(self)
    }
}

/// float32 and nothing else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Float32;

impl Kind for Float32 {
    const EXPECTED: &'static [Scalar] = &[Scalar::Float(Dtype::Float32)];

    fn of(scalar: Scalar) -> Option<Self> {
        (scalar == Scalar::Float(Dtype::Float32)).then_some(Self)
    }

    fn scalar(self) -> Scalar {
        Scalar::Float(Dtype::Float32)
    }
}

/// int64 and nothing else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Int64;

impl Kind for Int64 {
    const EXPECTED: &'static [Scalar] = &[Scalar::Int64];

    fn of(scalar: Scalar) -> Option<Self> {
        (scalar == Scalar::Int64).then_some(Self)
    }

    fn scalar(self) -> Scalar {
        Scalar::Int64
    }
}
