//! Rotary position embeddings: the kernel of [`crate::rotate`].
use super::{Kernel, Simd, WIDTH};
use crate::{Element, Rows};

/// Rotates the heads of the rows `x`, which are those from `first` on of the angles.
pub(crate) struct Rotate<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) cos: &'a Rows<'a, T>,
    pub(crate) sin: &'a Rows<'a, T>,
    pub(crate) first: usize,
    pub(crate) columns: usize,
}

impl<T: Element> Kernel for Rotate<'_, T> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        let half = self.cos.columns() / 2;
        let whole = half - half % WIDTH;
        for (i, row) in self.x.chunks_mut(self.columns.max(1)).enumerate() {
            let (cos, sin) = (self.cos.row(self.first + i), self.sin.row(self.first + i));
            for head in row.chunks_mut(2 * half) {
                for start in (0..whole).step_by(WIDTH) {
                    // SAFETY: 16 numbers of both halves of the head, and of the angles' rows, which are as long.
                    unsafe { turn(simd, head.as_mut_ptr().add(start), cos.add(start), sin.add(start), half) };
                }
                for start in whole..half {
                    turn_one(head, self.cos, self.sin, (self.first + i, start));
                }
            }
        }
    }

    fn run_scalar(self) {
        let half = self.cos.columns() / 2;
        for (i, row) in self.x.chunks_mut(self.columns.max(1)).enumerate() {
            for head in row.chunks_mut(2 * half) {
                for start in 0..half {
                    turn_one(head, self.cos, self.sin, (self.first + i, start));
                }
            }
        }
    }
}

/// Sixteen pairs of numbers, which stand `half` numbers apart.
///
/// # Safety
/// All three are valid for 16 numbers, and for as many from `half` on.
#[inline(always)]
unsafe fn turn<T: Element, S: Simd>(simd: S, x: *mut T, cos: *const T, sin: *const T, half: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        let (a, b) = (T::load(simd, x), T::load(simd, x.add(half)));
        let product = |number, with: *const T| rounded::<T, S>(simd, simd.multiply(number, T::load(simd, with)));
        let first = simd.subtract(product(a, cos), product(b, sin));
        let second = simd.add(product(b, cos.add(half)), product(a, sin.add(half)));
        T::store(simd, x, first);
        T::store(simd, x.add(half), second);
    }
}

/// The same numbers, rounded to the dtype.
#[inline(always)]
fn rounded<T: Element, S: Simd>(simd: S, numbers: S::F32) -> S::F32 {
    let mut lanes = [T::from_f32(0.0); WIDTH];
    // SAFETY: as many numbers as there are lanes.
    unsafe {
        T::store(simd, lanes.as_mut_ptr(), numbers);
        T::load(simd, lanes.as_ptr())
    }
}

/// One pair of a head, by the angles of this row.
#[inline(always)]
fn turn_one<T: Element>(head: &mut [T], cos: &Rows<'_, T>, sin: &Rows<'_, T>, (row, at): (usize, usize)) {
    let half = head.len() / 2;
    let (a, b) = (head[at].to_f32(), head[at + half].to_f32());
    let product = |number: f32, with: T| T::from_f32(number * with.to_f32()).to_f32();
    head[at] = T::from_f32(product(a, cos.get(row, at)) - product(b, sin.get(row, at)));
    head[at + half] = T::from_f32(product(b, cos.get(row, at + half)) + product(a, sin.get(row, at + half)));
}
