//! The one dropout rule: a mask that is a function of (seed, row, column) and is never stored.
//!
//! One Philox call per octet (8 consecutive columns of a row) gives 16 bits an element: element `j` of the octet reads
//! word `j / 2`, the low half when `j` is even. It is dropped where those bits are below `threshold = floor(p * 65536 +
//! 0.5)`, capped at 65535; the scale is `65536 / (65536 - threshold)`, exact for that threshold. `p` below 2^-17 rounds
//! to no dropout at all.
//!
//! A dropped element is multiplied by zero, as `torch.nn.Dropout` does it: a NaN or an infinity in it still reaches the
//! result. The scale is applied once, to the float32 row sum.
use crate::philox::{Stream, philox4x32_10};
use crate::reduce::OCTET;
use crate::{Error, Result};

/// A dropout mask and its scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    seed: u64,
    threshold: u16,
    scale: f32,
}

impl Dropout {
    /// The rule for probability `p`; `None` where `p` rounds to no dropout.
    ///
    /// # Errors
    /// [`Error::Probability`] unless `0 <= p < 1`.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= p < 1 is checked first")]
    pub fn new(p: f64, seed: u64) -> Result<Option<Self>> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::Probability(p));
        }
        let threshold = ((p * 65536.0 + 0.5).floor() as u32).min(65535) as u16;
        let scale = (65536.0 / (65536.0 - f64::from(threshold))) as f32;
        Ok((threshold > 0).then_some(Self { seed, threshold, scale }))
    }

    /// The seed: Philox's key.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Elements whose 16 bits are below this are dropped.
    #[must_use]
    pub fn threshold(&self) -> u16 {
        self.threshold
    }

    /// What the kept elements' sum is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Which elements of an octet are kept.
    #[must_use]
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a row is two counter words; bits are cut to 16")]
    pub fn keep(&self, row: u64, octet: u32) -> [bool; OCTET] {
        let words = philox4x32_10([octet, row as u32, (row >> 32) as u32, Stream::Dropout as u32], self.seed);
        std::array::from_fn(|j| (words[j / 2] >> (16 * (j % 2))) as u16 >= self.threshold)
    }

    /// Writes the keep mask of `[N, columns]` to `mask`, row-major: what the kernels compute and never store.
    ///
    /// # Errors
    /// [`Error::Length`] unless `mask` is whole rows of `columns`.
    #[expect(clippy::cast_possible_truncation, reason = "a counter word numbers the octets")]
    pub fn mask(&self, columns: usize, mask: &mut [bool]) -> Result<()> {
        let rows = mask.len().checked_div(columns).unwrap_or(0);
        if rows * columns != mask.len() {
            return Err(Error::Length { what: "mask", expected: rows.max(1) * columns, actual: mask.len() });
        }
        for (row, mask) in mask.chunks_exact_mut(columns.max(1)).enumerate() {
            for (octet, mask) in mask.chunks_mut(OCTET).enumerate() {
                mask.copy_from_slice(&self.keep(row as u64, octet as u32)[..mask.len()]);
            }
        }
        Ok(())
    }
}
