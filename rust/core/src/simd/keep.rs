//! The dropout mask of a row as bits: bit `h % 16` of word `h / 16` is set where column `h` is kept.
//!
//! Eight octets (64 columns) are drawn at once, one counter to a 64-bit lane: a 32 by 32 bit product fills a lane, its low
//! half is the next round's word as it is, and the high half takes one shift. High halves of words hold leftovers that no
//! multiplication reads.
//!
//! Of Philox's ten rounds the first two need not be run for each row and octet. The counter is (octet, row low, row high, 0),
//! so after two rounds the four words are `A[octet] ^ a[row]`, `B[octet]`, `C[octet] ^ c[row]` and `d[row]`: the columns'
//! part is tabled once a call and the rows' part is two multiplications a row.
use super::Simd;
use crate::philox::{MULTIPLIERS, ROUNDS, Stream, multiply, round_keys};
use crate::reduce::OCTET;
use crate::{Dropout, Result, allocation};

/// Octets drawn together: one to a lane of [`Simd::U64`].
const OCTETS: usize = 8;
/// Columns drawn together.
pub(crate) const COLUMNS: usize = OCTETS * OCTET;
/// The octet of each lane, such that two unpack instructions of any width leave the octets in rising order.
pub(crate) const ORDER: [usize; OCTETS] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Mask words of `columns` columns, rounded up to whole draws.
pub(crate) fn words(columns: usize) -> usize {
    columns.div_ceil(COLUMNS) * (COLUMNS / 16)
}

/// What a call's rows share: the round keys and the state of each octet after two rounds.
#[derive(Debug)]
pub(crate) struct Keep {
    dropout: Dropout,
    keys: [[u32; 2]; ROUNDS],
    /// For each draw the tables `A`, `B`, `C`, one lane each in the order of [`ORDER`].
    octets: Vec<[[u64; OCTETS]; 3]>,
}

/// What an octet's counter makes of the first two rounds: the tables `A`, `B`, `C`.
fn octet_state(octet: u32, keys: &[[u32; 2]; ROUNDS]) -> [u32; 3] {
    let (high, low) = multiply(MULTIPLIERS[0], octet);
    let (a, b) = multiply(MULTIPLIERS[1], high ^ Stream::Dropout as u32 ^ keys[0][1]);
    [a, b, low]
}

/// What a row's counter makes of the first two rounds: `a`, `c`, `d`.
#[expect(clippy::cast_possible_truncation, reason = "a row is two counter words")]
fn row_state(row: u64, keys: &[[u32; 2]; ROUNDS]) -> [u32; 3] {
    let (high, low) = multiply(MULTIPLIERS[1], (row >> 32) as u32);
    let (c, d) = multiply(MULTIPLIERS[0], high ^ row as u32 ^ keys[0][0]);
    [low ^ keys[1][0], c ^ keys[1][1], d]
}

impl Keep {
    /// The tables for rows of `columns` columns.
    #[expect(clippy::cast_possible_truncation, reason = "a counter word numbers the octets")]
    pub(crate) fn new(dropout: &Dropout, columns: usize) -> Result<Self> {
        let keys = round_keys(dropout.seed());
        let mut octets = allocation::filled([[0; OCTETS]; 3], columns.div_ceil(COLUMNS))?;
        for (draw, tables) in octets.iter_mut().enumerate() {
            for (lane, octet) in ORDER.into_iter().enumerate() {
                let state = octet_state((draw * OCTETS + octet) as u32, &keys);
                (0..3).for_each(|table| tables[table][lane] = u64::from(state[table]));
            }
        }
        Ok(Self { dropout: *dropout, keys, octets })
    }

    /// Draws the mask of the columns `COLUMNS * first..` of `row`, as many as `bits` has room for.
    ///
    /// `ahead` is the address of the row's elements of `size` bytes there, which are asked for meanwhile: drawing keeps the
    /// arithmetic units busy for longer than memory takes.
    #[inline(always)]
    pub(crate) fn fill<S: Simd>(
        &self,
        simd: S,
        row: u64,
        first: usize,
        bits: &mut [u16],
        ahead: *const u8,
        size: usize,
    ) {
        let row = row_state(row, &self.keys);
        let (a, c, d) = (simd.splat_u64(row[0]), simd.splat_u64(row[1]), simd.splat_u64(row[2]));
        let draws = bits.as_chunks_mut::<{ COLUMNS / 16 }>().0;
        for (i, (bits, tables)) in draws.iter_mut().zip(&self.octets[first..]).enumerate() {
            for line in 0..size {
                simd.prefetch(ahead.wrapping_add((i * size + line) * COLUMNS));
            }
            // SAFETY: each table is 8 words.
            let tables = unsafe {
                [
                    simd.load_u64(tables[0].as_ptr()),
                    simd.load_u64(tables[1].as_ptr()),
                    simd.load_u64(tables[2].as_ptr()),
                ]
            };
            let state = [simd.xor(tables[0], a), tables[1], simd.xor(tables[2], c), d];
            let mask = simd.not_below(self.rounds(simd, state), self.dropout.threshold());
            *bits = [mask as u16, (mask >> 16) as u16, (mask >> 32) as u16, (mask >> 48) as u16];
        }
    }

    /// The last eight rounds.
    #[inline(always)]
    fn rounds<S: Simd>(&self, simd: S, mut state: [S::U64; 4]) -> [S::U64; 4] {
        let (m0, m1) = (simd.splat_u64(MULTIPLIERS[0]), simd.splat_u64(MULTIPLIERS[1]));
        for key in &self.keys[2..] {
            let (p0, p1) = (simd.multiply_wide(state[0], m0), simd.multiply_wide(state[2], m1));
            let (k0, k1) = (simd.splat_u64(key[0]), simd.splat_u64(key[1]));
            state = [simd.high_xor(p1, state[1], k0), p1, simd.high_xor(p0, state[3], k1), p0];
        }
        state
    }

    /// [`Keep::fill`] in plain Rust.
    #[expect(clippy::cast_possible_truncation, reason = "a counter word numbers the octets")]
    pub(crate) fn fill_scalar(&self, row: u64, first: usize, bits: &mut [u16]) {
        for (i, word) in bits.iter_mut().enumerate() {
            let octet = (first * OCTETS + 2 * i) as u32;
            let kept = [self.dropout.keep(row, octet), self.dropout.keep(row, octet + 1)];
            *word = kept.as_flattened().iter().rev().fold(0, |word, &kept| word << 1 | u16::from(kept));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;
    use crate::simd::Kernel;

    /// The masks of one row, by the level's vectors or by plain Rust.
    struct Fill<'a> {
        keep: &'a Keep,
        row: u64,
        bits: &'a mut [u16],
    }

    impl Kernel for Fill<'_> {
        #[inline(always)]
        fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
            self.keep.fill(simd, self.row, 0, self.bits, std::ptr::null(), 2);
        }
        fn run_scalar(self) {
            self.keep.fill_scalar(self.row, 0, self.bits);
        }
    }

    /// No tensor has 2^32 rows in a test, but the counter has room for them.
    #[test]
    fn both_words_of_a_row_count() -> crate::Result<()> {
        let Some(dropout) = Dropout::new(0.5, 0x0123_4567_89AB_CDEF)? else { return Ok(()) };
        let keep = Keep::new(&dropout, 4 * COLUMNS)?;
        let mask = |level: Level, row: u64| {
            let mut bits = vec![0; words(4 * COLUMNS)];
            level.run(Fill { keep: &keep, row, bits: &mut bits });
            bits
        };
        for row in [0, 7, u64::from(u32::MAX), 1 << 32, (5 << 32) + 7, u64::MAX] {
            let expected = mask(Level::Scalar, row);
            assert!(Level::available().into_iter().all(|level| mask(level, row) == expected), "row {row}");
            assert!(row < 1 << 32 || expected != mask(Level::Scalar, row & u64::from(u32::MAX)), "row {row}");
        }
        Ok(())
    }
}
