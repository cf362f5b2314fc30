//! Everything that can be wrong with a call, as one enum.

/// Why a kernel refused its arguments. The list is whole, so that whoever maps it meets a new kind. Nothing is written when one of these is returned, but for [`Error::Allocation`].
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A buffer or dimension has the wrong size.
    #[error("{what}: expected {expected} elements, got {actual}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// The size that the other arguments imply.
        expected: usize,
        /// The size that came.
        actual: usize,
    },
    /// A dropout probability outside `[0, 1)`.
    #[error("dropout probability must lie in [0, 1), got {0}")]
    Probability(f64),
    /// A standard deviation that is negative or not finite.
    #[error("standard deviation must be finite and not negative, got {0}")]
    StandardDeviation(f32),
    /// A token outside the vocabulary.
    #[error("{what}: expected token ids below {vocabulary}, got {token} in row {row}")]
    Token {
        /// Which argument.
        what: &'static str,
        /// Its row.
        row: usize,
        /// The token id.
        token: i64,
        /// Tokens of the vocabulary.
        vocabulary: usize,
    },
    /// Offsets of rollouts that do not rise from 0.
    #[error("offsets: expected numbers that rise from 0, got {actual} at place {at}, after {before}")]
    Offsets {
        /// The place in the offsets.
        at: usize,
        /// The offset before.
        before: i64,
        /// The offset that came.
        actual: i64,
    },
    /// A number of a rollout that is NaN or infinite.
    #[error("{what}: expected finite numbers, got {value} at {place}")]
    NotFinite {
        /// Which argument.
        what: &'static str,
        /// The number.
        value: f32,
        /// Where it is.
        place: Place,
    },
    /// A rollout that has no place for its reward.
    #[error(
        "mask: expected a token of the model in every rollout that gets a reward, got none in rollout {rollout}; leave it out"
    )]
    NoModelToken {
        /// Which rollout.
        rollout: usize,
    },
    /// An instruction set that this processor does not have.
    #[error("instruction set {0} is not available on this processor")]
    Level(&'static str),
    /// Memory that the arguments' sizes ask for is not there. What was to be written is unspecified.
    #[error("cannot allocate {bytes} bytes")]
    Allocation {
        /// How much was asked for.
        bytes: usize,
    },
    /// Strides and sizes that reach outside the buffer, or do not fit together.
    #[error("{what}: sizes {sizes:?} with strides {strides:?} do not fit a buffer of {length} elements")]
    Layout {
        /// Which argument.
        what: &'static str,
        /// Sizes of the outer dimensions.
        sizes: Vec<usize>,
        /// Strides of the outer dimensions, in elements.
        strides: Vec<isize>,
        /// Elements in the buffer.
        length: usize,
    },
}

/// Where a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At a token.
    Token {
        /// Which token of the rollout.
        position: usize,
        /// Which rollout.
        rollout: usize,
    },
    /// At a rollout as a whole.
    Rollout(usize),
    /// In a flat array.
    Number(usize),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Token { position, rollout } => write!(f, "token {position} of rollout {rollout}"),
            Self::Rollout(rollout) => write!(f, "rollout {rollout}"),
            Self::Number(number) => write!(f, "place {number}"),
        }
    }
}

/// A kernel's result.
pub type Result<T> = std::result::Result<T, Error>;
