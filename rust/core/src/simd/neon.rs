//! NEON: 16 float32 lanes are four registers, and a row's 256 lanes take four passes.
//!
//! float16 is converted in plain Rust: the conversion instructions' intrinsics are not in stable Rust.
use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::aarch64::*;

/// Proof that the processor has NEON.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon(());

/// # Safety
/// The processor has the target features.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<_, 4>(Neon(()));
}

// SAFETY (of every block below): a `Neon` exists only where the processor has the instructions; pointers are valid as the
// trait's contract says. Loads and stores go through byte pointers, which need no alignment.
impl Simd for Neon {
    type F32 = [float32x4_t; 4];
    type U64 = [uint64x2_t; 4];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [vdupq_n_f32(value); 4] }
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1]), vaddq_f32(a[2], b[2]), vaddq_f32(a[3], b[3])] }
    }
    #[inline(always)]
    fn subtract(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1]), vsubq_f32(a[2], b[2]), vsubq_f32(a[3], b[3])] }
    }
    #[inline(always)]
    fn divide(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [vdivq_f32(a[0], b[0]), vdivq_f32(a[1], b[1]), vdivq_f32(a[2], b[2]), vdivq_f32(a[3], b[3])] }
    }
    #[inline(always)]
    fn choose_less(self, a: Self::F32, b: Self::F32, yes: Self::F32, no: Self::F32) -> Self::F32 {
        let mut chosen = no;
        for (i, chosen) in chosen.iter_mut().enumerate() {
            // SAFETY: see the head of this block.
            *chosen = unsafe { vbslq_f32(vcltq_f32(a[i], b[i]), yes[i], no[i]) };
        }
        chosen
    }
    #[inline(always)]
    fn power_of_two(self, a: Self::F32) -> Self::F32 {
        let mut power = a;
        for power in &mut power {
            // SAFETY: see the head of this block.
            unsafe {
                let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(*power));
                *power = vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3f80_0000)));
            }
        }
        power
    }
    #[inline(always)]
    fn maximum(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        let mut greater = b;
        for ((greater, a), b) in greater.iter_mut().zip(a).zip(b) {
            // SAFETY: see the head of this block.
            *greater = unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) };
        }
        greater
    }
    #[inline(always)]
    fn multiply(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1]), vmulq_f32(a[2], b[2]), vmulq_f32(a[3], b[3])] }
    }
    #[inline(always)]
    fn multiply_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }
    #[inline(always)]
    fn keep(self, a: Self::F32, bits: u16) -> Self::F32 {
        const LANES: [[u32; 4]; 4] =
            [[1, 2, 4, 8], [16, 32, 64, 128], [256, 512, 1024, 2048], [4096, 8192, 16384, 32768]];
        let mut kept = a;
        for (kept, lanes) in kept.iter_mut().zip(&LANES) {
            // SAFETY: see the head of this block; `lanes` is 4 words.
            unsafe {
                let mask = vtstq_u32(vdupq_n_u32(u32::from(bits)), vld1q_u32(lanes.as_ptr()));
                *kept = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(*kept), mask));
            }
        }
        kept
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [load(from), load(from.add(4)), load(from.add(8)), load(from.add(12))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe {
            let low = vreinterpretq_u16_u8(vld1q_u8(from.cast()));
            let high = vreinterpretq_u16_u8(vld1q_u8(from.add(8).cast()));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe {
            let numbers: [f32; 16] = std::array::from_fn(|i| from.add(i).read_unaligned().to_f32());
            self.load_f32(numbers.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, value: Self::F32) {
        for (i, part) in value.into_iter().enumerate() {
            // SAFETY: see the head of this block.
            unsafe { vst1q_u8(to.add(4 * i).cast(), vreinterpretq_u8_f32(part)) };
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: Self::F32) {
        // SAFETY: see the head of this block.
        unsafe {
            let low = vuzp2q_u16(round_bf16(value[0]), round_bf16(value[1]));
            let high = vuzp2q_u16(round_bf16(value[2]), round_bf16(value[3]));
            vst1q_u8(to.cast(), vreinterpretq_u8_u16(low));
            vst1q_u8(to.add(8).cast(), vreinterpretq_u8_u16(high));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: Self::F32) {
        let mut numbers = [0.0_f32; 16];
        // SAFETY: see the head of this block.
        unsafe {
            self.store_f32(numbers.as_mut_ptr(), value);
            to.cast::<[f16; 16]>().write_unaligned(numbers.map(f16::from_f32));
        }
    }
    #[inline(always)]
    unsafe fn fold_octets<const GROUPS: usize>(self, lanes: &[Self::F32; GROUPS], to: *mut f32) {
        for (i, group) in lanes.iter().enumerate() {
            // SAFETY: see the head of this block; 2 sums are written for each group.
            unsafe {
                let quads = vpaddq_f32(vpaddq_f32(group[0], group[1]), vpaddq_f32(group[2], group[3]));
                vst1_f32(to.add(2 * i), vget_low_f32(vpaddq_f32(quads, quads)));
            }
        }
    }

    #[inline(always)]
    fn splat_u64(self, value: u32) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [vdupq_n_u64(u64::from(value)); 4] }
    }
    #[inline(always)]
    unsafe fn load_u64(self, from: *const u64) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [vld1q_u64(from), vld1q_u64(from.add(2)), vld1q_u64(from.add(4)), vld1q_u64(from.add(6))] }
    }
    #[inline(always)]
    fn multiply_wide(self, a: Self::U64, b: Self::U64) -> Self::U64 {
        let mut products = a;
        for (product, b) in products.iter_mut().zip(b) {
            // SAFETY: see the head of this block.
            *product = unsafe { vmull_u32(vmovn_u64(*product), vmovn_u64(b)) };
        }
        products
    }
    #[inline(always)]
    fn xor(self, a: Self::U64, b: Self::U64) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [veorq_u64(a[0], b[0]), veorq_u64(a[1], b[1]), veorq_u64(a[2], b[2]), veorq_u64(a[3], b[3])] }
    }
    #[inline(always)]
    fn high_xor(self, product: Self::U64, b: Self::U64, c: Self::U64) -> Self::U64 {
        let mut high = product;
        for high in &mut high {
            // SAFETY: see the head of this block.
            *high = unsafe { vshrq_n_u64::<32>(*high) };
        }
        self.xor(high, self.xor(b, c))
    }
    #[inline(always)]
    fn not_below(self, words: [Self::U64; 4], threshold: u16) -> u64 {
        let mut bits = 0;
        for i in 0..4 {
            // Lanes 2i and 2i + 1 hold octets i and 4 + i.
            // SAFETY: see the head of this block.
            unsafe {
                let first = vsliq_n_u64::<32>(words[0][i], words[1][i]);
                let second = vsliq_n_u64::<32>(words[2][i], words[3][i]);
                bits |= octet_bits(vzip1q_u64(first, second), threshold) << (8 * i);
                bits |= octet_bits(vzip2q_u64(first, second), threshold) << (8 * i + 32);
            }
        }
        bits
    }
    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
}

/// # Safety
/// `from` is valid for 4 unaligned reads.
#[inline(always)]
unsafe fn load(from: *const f32) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe { vreinterpretq_f32_u8(vld1q_u8(from.cast())) }
}

/// Bits of the nearest bfloat16 in the upper half of each lane: half of the last place, less one where the last place is
/// even, is added. A NaN keeps its upper half, quiet.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn round_bf16(value: float32x4_t) -> uint16x8_t {
    // SAFETY: as the caller promises.
    unsafe {
        let bits = vreinterpretq_u32_f32(value);
        let even = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), even);
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet))
    }
}

/// One bit for each of an octet's unsigned 16-bit numbers: set where it is not below the threshold.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn octet_bits(words: uint64x2_t, threshold: u16) -> u64 {
    const LANES: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
    // SAFETY: as the caller promises; `LANES` is 8 words.
    unsafe {
        let kept = vcgeq_u16(vreinterpretq_u16_u64(words), vdupq_n_u16(threshold));
        u64::from(vaddvq_u16(vandq_u16(kept, vld1q_u16(LANES.as_ptr()))))
    }
}
