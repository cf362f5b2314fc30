//! The vector operations that a kernel is written in.
use half::{bf16, f16};

/// Numbers in one [`Simd::F32`].
pub(crate) const WIDTH: usize = 16;

/// Vector operations. A value of the type is the proof that the processor has them.
///
/// Every method is `#[inline(always)]` and each arithmetic one is IEEE 754 in every lane, rounded once.
pub trait Simd: Copy {
    /// 16 float32 lanes.
    type F32: Copy;
    /// 8 lanes of 64 bits.
    type U64: Copy;

    /// `value` in all lanes.
    fn splat(self, value: f32) -> Self::F32;
    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn subtract(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn divide(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `yes` where `a < b`, else `no`: also where one of them is NaN.
    fn choose_less(self, a: Self::F32, b: Self::F32, yes: Self::F32, no: Self::F32) -> Self::F32;
    /// 2^n, where `a` is [`super::elementary::MAGIC`] + n for an integer n from -126 to 127.
    fn power_of_two(self, a: Self::F32) -> Self::F32;
    /// `a` where it is greater than `b`, else `b`: NaN where `b` is, and `b` where `a` is NaN.
    fn maximum(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn multiply(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn multiply_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a` where the lane's bit is set, +0 elsewhere.
    fn keep(self, a: Self::F32, bits: u16) -> Self::F32;

    /// 16 numbers.
    ///
    /// # Safety
    /// `from` is valid for 16 unaligned reads.
    unsafe fn load_f32(self, from: *const f32) -> Self::F32;
    /// 16 numbers, exactly.
    ///
    /// # Safety
    /// As [`Simd::load_f32`].
    unsafe fn load_bf16(self, from: *const bf16) -> Self::F32;
    /// 16 numbers, exactly.
    ///
    /// # Safety
    /// As [`Simd::load_f32`].
    unsafe fn load_f16(self, from: *const f16) -> Self::F32;
    /// 16 numbers.
    ///
    /// # Safety
    /// `to` is valid for 16 unaligned writes.
    unsafe fn store_f32(self, to: *mut f32, value: Self::F32);
    /// 16 numbers, rounded to nearest even.
    ///
    /// # Safety
    /// As [`Simd::store_f32`].
    unsafe fn store_bf16(self, to: *mut bf16, value: Self::F32);
    /// 16 numbers, rounded to nearest even.
    ///
    /// # Safety
    /// As [`Simd::store_f32`].
    unsafe fn store_f16(self, to: *mut f16, value: Self::F32);
    /// 16 pairs of numbers, one of `a` and one of `b`, rounded to nearest even.
    ///
    /// # Safety
    /// `to` is valid for 32 unaligned writes.
    #[inline(always)]
    unsafe fn store_bf16_pairs(self, to: *mut bf16, a: Self::F32, b: Self::F32) {
        let mut apart = [[bf16::ZERO; WIDTH]; 2];
        // SAFETY: as the caller promises.
        unsafe {
            self.store_bf16(apart[0].as_mut_ptr(), a);
            self.store_bf16(apart[1].as_mut_ptr(), b);
            for (i, (a, b)) in apart[0].iter().zip(&apart[1]).enumerate() {
                to.add(2 * i).write_unaligned(*a);
                to.add(2 * i + 1).write_unaligned(*b);
            }
        }
    }
    /// Step 2 of [`crate::reduce`]: the octet sums of `GROUPS * 16` lanes.
    ///
    /// # Safety
    /// `to` is valid for `GROUPS * 2` writes.
    unsafe fn fold_octets<const GROUPS: usize>(self, lanes: &[Self::F32; GROUPS], to: *mut f32);

    /// `value` in the low half of all lanes; the high halves hold anything.
    fn splat_u64(self, value: u32) -> Self::U64;
    /// 8 words.
    ///
    /// # Safety
    /// `from` is valid for 8 unaligned reads.
    unsafe fn load_u64(self, from: *const u64) -> Self::U64;
    /// Product of the low halves.
    fn multiply_wide(self, a: Self::U64, b: Self::U64) -> Self::U64;
    /// `a ^ b`.
    fn xor(self, a: Self::U64, b: Self::U64) -> Self::U64;
    /// `(product >> 32) ^ b ^ c`; the high halves of the result hold anything.
    fn high_xor(self, product: Self::U64, b: Self::U64, c: Self::U64) -> Self::U64;
    /// Compares the 16-bit halves of eight octets' four words (low halves of the lanes) with `threshold`: bit `8 * o + j`
    /// is set where element `j` of octet `o` is not below it. Lane `i` holds octet [`super::keep::ORDER`]`[i]`.
    fn not_below(self, words: [Self::U64; 4], threshold: u16) -> u64;
    /// Asks for a cache line that is soon read; any address will do.
    fn prefetch(self, address: *const u8);
}

/// An element that vectors are loaded from and stored to.
pub trait Lanes: Copy {
    /// 16 elements as float32, exactly.
    ///
    /// # Safety
    /// `from` is valid for 16 unaligned reads.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::F32;
    /// 16 elements, each rounded once.
    ///
    /// # Safety
    /// `to` is valid for 16 unaligned writes.
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, value: S::F32);
}

macro_rules! lanes {
    ($element:ty, $load:ident, $store:ident) => {
        impl Lanes for $element {
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::F32 {
                // SAFETY: as the caller promises.
                unsafe { simd.$load(from) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(simd: S, to: *mut Self, value: S::F32) {
                // SAFETY: as the caller promises.
                unsafe { simd.$store(to, value) }
            }
        }
    };
}

lanes!(f32, load_f32, store_f32);
lanes!(bf16, load_bf16, store_bf16);
lanes!(f16, load_f16, store_f16);
