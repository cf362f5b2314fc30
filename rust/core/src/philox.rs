//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random bits as a function.

pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Rounds of the recommended variant.
pub const ROUNDS: usize = 10;

/// What a counter is used for; it fills the fourth counter word, so that no two uses share bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Dropout: counter = (octet of the row, row low, row high, 0).
    Dropout = 0,
    /// Weight init: counter = (index / 4 low, index / 4 high, 0, 1).
    Weight = 1,
    /// Bias init: counter = (index / 4 low, index / 4 high, 0, 2).
    Bias = 2,
}

/// 128 random bits for (seed, counter).
#[must_use]
#[inline]
pub fn philox4x32_10(counter: [u32; 4], seed: u64) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for [k0, k1] in round_keys(seed) {
        let (high0, low0) = multiply(MULTIPLIERS[0], c0);
        let (high1, low1) = multiply(MULTIPLIERS[1], c2);
        (c0, c1, c2, c3) = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0);
    }
    [c0, c1, c2, c3]
}

/// The ten round keys of a seed.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a seed is two 32-bit words")]
pub fn round_keys(seed: u64) -> [[u32; 2]; ROUNDS] {
    let (low, high) = (seed as u32, (seed >> 32) as u32);
    std::array::from_fn(|i| {
        [low.wrapping_add(WEYL[0].wrapping_mul(i as u32)), high.wrapping_add(WEYL[1].wrapping_mul(i as u32))]
    })
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "splits a 64-bit product")]
pub(crate) fn multiply(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors of Random123's `kat_vectors`, philox4x32 10.
    #[test]
    fn matches_random123() {
        let cases = [
            ([0; 4], 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], u64::MAX, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                0x299f_31d0_a409_3822,
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, seed, expected) in cases {
            assert_eq!(philox4x32_10(counter, seed), expected);
        }
    }
}
