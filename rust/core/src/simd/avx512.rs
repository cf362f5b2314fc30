//! AVX-512 F, BW, DQ, VL: 16 float32 lanes are one register, and a row's 256 lanes are sixteen.
use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(());

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// # Safety
/// The processor has the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<_, 16>(Avx512(()));
}

// SAFETY (of every block below): an `Avx512` exists only where the processor has the instructions; pointers are valid as
// the trait's contract says, and every access is an unaligned one.
impl Simd for Avx512 {
    type F32 = __m512;
    type U64 = __m512i;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn subtract(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn divide(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn choose_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
    }
    #[inline(always)]
    fn power_of_two(self, a: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(a));
            _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000)))
        }
    }
    #[inline(always)]
    fn maximum(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn multiply_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn keep(self, a: __m512, bits: u16) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_maskz_mov_ps(bits, a) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: see the head of this block.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, value: __m512) {
        // SAFETY: see the head of this block.
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: __m512) {
        // SAFETY: see the head of this block.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded(value)))) }
    }
    #[inline(always)]
    unsafe fn store_bf16_pairs(self, to: *mut bf16, a: __m512, b: __m512) {
        // SAFETY: see the head of this block.
        unsafe {
            let upper = _mm512_and_si512(rounded(b), _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(_mm512_srli_epi32::<16>(rounded(a)), upper));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: __m512) {
        // SAFETY: see the head of this block.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
    #[inline(always)]
    unsafe fn fold_octets<const GROUPS: usize>(self, lanes: &[__m512; GROUPS], to: *mut f32) {
        for (i, four) in lanes.as_chunks::<4>().0.iter().enumerate() {
            // Adjacent pairs twice: 128-bit part `p` of `quads` holds the sums of lanes 4p..4p+4 of the four groups.
            // SAFETY: see the head of this block; `i` is below GROUPS / 4, and 8 sums are written for each.
            unsafe {
                let quads = add_pairs(add_pairs(four[0], four[1]), add_pairs(four[2], four[3]));
                let octets = _mm512_add_ps(quads, _mm512_shuffle_f32x4::<0b10_11_00_01>(quads, quads));
                let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
                let sums = _mm512_permutexvar_ps(order, octets);
                _mm256_storeu_ps(to.add(8 * i), _mm512_castps512_ps256(sums));
            }
        }
    }

    #[inline(always)]
    fn splat_u64(self, value: u32) -> __m512i {
        // SAFETY: see the head of this block.
        unsafe { _mm512_set1_epi32(value.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn load_u64(self, from: *const u64) -> __m512i {
        // SAFETY: see the head of this block.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn multiply_wide(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see the head of this block.
        unsafe { _mm512_mul_epu32(a, b) }
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see the head of this block.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    fn high_xor(self, product: __m512i, b: __m512i, c: __m512i) -> __m512i {
        // SAFETY: see the head of this block.
        unsafe { _mm512_ternarylogic_epi32::<0x96>(_mm512_srli_epi64::<32>(product), b, c) }
    }
    #[inline(always)]
    fn not_below(self, words: [__m512i; 4], threshold: u16) -> u64 {
        // SAFETY: see the head of this block.
        unsafe {
            let first = _mm512_mask_shuffle_epi32::<0b10_10_00_00>(words[0], 0xAAAA, words[1]);
            let second = _mm512_mask_shuffle_epi32::<0b10_10_00_00>(words[2], 0xAAAA, words[3]);
            let limit = _mm512_set1_epi16(threshold.cast_signed());
            let low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(first, second), limit);
            let high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(first, second), limit);
            u64::from(low) | u64::from(high) << 32
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: see the head of this block; a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

/// Numbers whose upper halves are the nearest bfloat16 ones.
///
/// The hardware's own conversion (AVX512_BF16) flushes subnormal numbers, so the rounding is done on integers: half of the
/// last place, less one where the last place is even, is added. A NaN keeps its upper half, quiet.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn rounded(value: __m512) -> __m512i {
    // SAFETY: as the caller promises.
    unsafe {
        let bits = _mm512_castps_si512(value);
        let even = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

/// In each 128-bit part: `[a0 + a1, a2 + a3, b0 + b1, b2 + b3]`.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn add_pairs(a: __m512, b: __m512) -> __m512 {
    // SAFETY: as the caller promises.
    unsafe { _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b)) }
}
