//! Root-mean-square norms: the kernel of [`crate::rms_norm`].
use super::{Kernel, Simd, WIDTH};
use crate::reduce::{self, LANES, OCTETS};
use crate::{Element, Rows};

/// Writes the norms of the rows from `first` on, as many as `to` holds.
pub(crate) struct RmsNorm<'a, T> {
    pub(crate) x: &'a Rows<'a, T>,
    pub(crate) weight: &'a [f32],
    pub(crate) epsilon: f32,
    pub(crate) first: usize,
    pub(crate) to: &'a mut [T],
}

impl<T> RmsNorm<'_, T> {
    #[inline(always)]
    fn scale(&self, squares: f32) -> f32 {
        1.0 / (squares / self.weight.len() as f32 + self.epsilon).sqrt()
    }
}

impl<T: Element> Kernel for RmsNorm<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        let columns = self.weight.len();
        let whole = columns - columns % LANES;
        let mut tail = [T::from_f32(0.0); LANES];
        let mut weights = [0.0; LANES];
        weights[..columns - whole].copy_from_slice(&self.weight[whole..]);
        for i in 0..self.to.len().checked_div(columns).unwrap_or(0) {
            let row = self.x.row(self.first + i);
            self.x.read_part(self.first + i, whole, &mut tail[..columns - whole]);
            // SAFETY: the row has `whole` columns, a multiple of the lanes, and the tail has as many as there are lanes.
            let squares = unsafe { squares::<T, S, GROUPS>(simd, row, whole, tail.as_ptr()) };
            let scale = simd.splat(self.scale(squares));
            let to = &mut self.to[i * columns..][..columns];
            for start in (0..whole).step_by(WIDTH) {
                // SAFETY: 16 columns of the row, of the weight and of the result.
                unsafe {
                    scaled(simd, row.add(start), scale, self.weight.as_ptr().add(start), to.as_mut_ptr().add(start));
                }
            }
            let mut last = [T::from_f32(0.0); LANES];
            for start in (0..columns - whole).step_by(WIDTH) {
                // SAFETY: 16 of as many columns as there are lanes.
                unsafe {
                    let to = last.as_mut_ptr().add(start);
                    scaled(simd, tail.as_ptr().add(start), scale, weights.as_ptr().add(start), to);
                }
            }
            to[whole..].copy_from_slice(&last[..columns - whole]);
        }
    }

    fn run_scalar(self) {
        let columns = self.weight.len();
        for i in 0..self.to.len().checked_div(columns).unwrap_or(0) {
            let mut lanes = [0.0_f32; LANES];
            for h in 0..columns {
                let x = self.x.get(self.first + i, h).to_f32();
                lanes[h % LANES] = x.mul_add(x, lanes[h % LANES]);
            }
            let scale = self.scale(reduce::fold(&lanes));
            for h in 0..columns {
                let x = T::from_f32(self.x.get(self.first + i, h).to_f32() * scale);
                self.to[i * columns + h] = T::from_f32(x.to_f32() * self.weight[h]);
            }
        }
    }
}

/// The sum of a row's squares in the order of [`crate::reduce`].
///
/// # Safety
/// `row` is valid for `whole` columns, a multiple of [`LANES`], and `tail` for [`LANES`].
#[inline(always)]
unsafe fn squares<T: Element, S: Simd, const GROUPS: usize>(
    simd: S,
    row: *const T,
    whole: usize,
    tail: *const T,
) -> f32 {
    let mut octets = [0.0; OCTETS];
    for first in (0..LANES / WIDTH).step_by(GROUPS) {
        let mut lanes = [simd.splat(0.0); GROUPS];
        for start in (0..=whole).step_by(LANES) {
            for (group, lane) in lanes.iter_mut().enumerate() {
                // SAFETY: as the caller promises; this pass owns `GROUPS * 2` octets from `first * 2` on.
                unsafe {
                    let from = if start < whole { row.add(start) } else { tail };
                    let x = T::load(simd, from.add((first + group) * WIDTH));
                    *lane = simd.multiply_add(x, x, *lane);
                }
            }
        }
        // SAFETY: as above.
        unsafe { simd.fold_octets(&lanes, octets.as_mut_ptr().add(first * 2)) };
    }
    reduce::fold_halves(&mut octets)
}

/// Sixteen columns of a norm.
///
/// # Safety
/// All three are valid for 16 columns.
#[inline(always)]
unsafe fn scaled<T: Element, S: Simd>(simd: S, x: *const T, scale: S::F32, weight: *const f32, to: *mut T) {
    let mut lanes = [T::from_f32(0.0); WIDTH];
    // SAFETY: as the caller promises.
    unsafe {
        T::store(simd, lanes.as_mut_ptr(), simd.multiply(T::load(simd, x), scale));
        T::store(simd, to, simd.multiply(T::load(simd, lanes.as_ptr()), simd.load_f32(weight)));
    }
}
