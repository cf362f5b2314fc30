//! The one order of additions. Every backend (scalar, AVX2, AVX-512, NEON, CUDA, candle) follows it bit for bit.
//!
//! A row of `H` products is reduced in three steps:
//!
//! 1. **Lanes.** [`LANES`] = 256 partial sums, all starting at +0. Column `h` belongs to lane `h % 256`; a lane takes
//!    its columns in rising order, one fused multiply-add each: `lane = fma(hidden, weight, lane)`.
//! 2. **Octets.** Eight consecutive lanes are added as adjacent pairs:
//!    `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`, which leaves 32 octet sums.
//! 3. **Halves.** The 32 octet sums are folded by halves: `t += t + 16`, then 8, 4, 2, 1.
//!
//! Why these numbers: on a GPU one warp owns a row, its 32 threads load 16 bytes (8 half-precision columns) each, so a
//! lane is a register, step 2 stays inside a thread and step 3 is five xor-shuffles. On the CPU the 256 lanes are 16
//! AVX-512 registers, or four passes of 8 AVX2 registers, and step 2 is the hardware's horizontal add.
//!
//! Columns past `H` contribute nothing. The sign of a zero lane carries no information: a backend may pad with zeros,
//! since the last step ([`finish`]) returns +0 for either. A NaN is a NaN: its sign and payload are not promised.

/// Partial sums of a row.
pub const LANES: usize = 256;
/// Lanes that one GPU thread holds, and columns that share one Philox call.
pub const OCTET: usize = 8;
/// Octets in a row of lanes: the threads of a warp.
pub const OCTETS: usize = LANES / OCTET;

/// float32, or float64 where [`sum`] adds.
pub trait Float: Copy + Default + std::ops::Add<Output = Self> {}
impl Float for f32 {}
impl Float for f64 {}

/// Steps 2 and 3: the sum of 256 lanes.
#[must_use]
pub fn fold<T: Float>(lanes: &[T; LANES]) -> T {
    let mut octets = [T::default(); OCTETS];
    for (octet, lane) in octets.iter_mut().zip(lanes.as_chunks::<OCTET>().0) {
        *octet = fold_octet(lane);
    }
    fold_halves(&mut octets)
}

/// Step 2: adjacent pairs.
#[must_use]
#[inline]
pub fn fold_octet<T: Float>(lane: &[T; OCTET]) -> T {
    ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]))
}

/// Step 3: by halves. `slots` must have a power-of-two length; it is overwritten.
#[inline]
pub fn fold_halves<T: Float>(slots: &mut [T]) -> T {
    let mut half = slots.len() / 2;
    while half > 0 {
        for i in 0..half {
            slots[i] = slots[i] + slots[i + half];
        }
        half /= 2;
    }
    slots[0]
}

/// The value of a row: `fma(sum, scale, bias)`, with a bias of -0 read as +0.
#[must_use]
#[inline]
pub fn finish(sum: f32, scale: f32, bias: f32) -> f32 {
    sum.mul_add(scale, bias + 0.0)
}

/// Sum of `values` in the order above, in float64 and rounded once.
///
/// It serves a column of numbers as long as the batch, a gradient of the bias: few enough that float64 costs nothing, and
/// so many that float32 would lose digits.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "one rounding to float32 is the promise")]
pub fn sum(values: impl IntoIterator<Item = f32>) -> f32 {
    let mut lanes = [0.0_f64; LANES];
    for (i, value) in values.into_iter().enumerate() {
        lanes[i % LANES] += f64::from(value);
    }
    fold(&lanes) as f32
}
