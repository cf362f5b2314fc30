//! AVX2, FMA and F16C: 16 float32 lanes are two registers, and a row's 256 lanes take four passes.
use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// # Safety
/// The processor has the target features.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<_, 4>(Avx2(()));
}

// SAFETY (of every block below): an `Avx2` exists only where the processor has the instructions; pointers are valid as
// the trait's contract says, and every access is an unaligned one.
impl Simd for Avx2 {
    type F32 = [__m256; 2];
    type U64 = [__m256i; 2];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn subtract(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn divide(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn choose_less(self, a: Self::F32, b: Self::F32, yes: Self::F32, no: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe {
            [
                _mm256_blendv_ps(no[0], yes[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
                _mm256_blendv_ps(no[1], yes[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
            ]
        }
    }
    #[inline(always)]
    fn power_of_two(self, a: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe {
            let one = _mm256_set1_epi32(0x3f80_0000);
            [
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(a[0])), one)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(a[1])), one)),
            ]
        }
    }
    #[inline(always)]
    fn maximum(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn multiply(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn multiply_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn keep(self, a: Self::F32, bits: u16) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe {
            let bits = _mm256_set1_epi32(i32::from(bits));
            let low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let high = _mm256_slli_epi32::<8>(low);
            [keep_eight(a[0], bits, low), keep_eight(a[1], bits, high)]
        }
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [widen_bf16(_mm_loadu_si128(from.cast())), widen_bf16(_mm_loadu_si128(from.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, value: Self::F32) {
        // SAFETY: see the head of this block.
        unsafe {
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: Self::F32) {
        // SAFETY: see the head of this block.
        unsafe {
            let both = _mm256_packus_epi32(round_bf16(value[0]), round_bf16(value[1]));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(both));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, value: Self::F32) {
        // SAFETY: see the head of this block.
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[0]));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[1]));
        }
    }
    #[inline(always)]
    unsafe fn fold_octets<const GROUPS: usize>(self, lanes: &[Self::F32; GROUPS], to: *mut f32) {
        for (i, two) in lanes.as_chunks::<2>().0.iter().enumerate() {
            // SAFETY: see the head of this block; `i` is below GROUPS / 2, and 4 sums are written for each.
            unsafe {
                let quads = _mm256_hadd_ps(_mm256_hadd_ps(two[0][0], two[0][1]), _mm256_hadd_ps(two[1][0], two[1][1]));
                let octets = _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads));
                _mm_storeu_ps(to.add(4 * i), octets);
            }
        }
    }

    #[inline(always)]
    fn splat_u64(self, value: u32) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_set1_epi32(value.cast_signed()); 2] }
    }
    #[inline(always)]
    unsafe fn load_u64(self, from: *const u64) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(4).cast())] }
    }
    #[inline(always)]
    fn multiply_wide(self, a: Self::U64, b: Self::U64) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_mul_epu32(a[0], b[0]), _mm256_mul_epu32(a[1], b[1])] }
    }
    #[inline(always)]
    fn xor(self, a: Self::U64, b: Self::U64) -> Self::U64 {
        // SAFETY: see the head of this block.
        unsafe { [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn high_xor(self, product: Self::U64, b: Self::U64, c: Self::U64) -> Self::U64 {
        // SAFETY: see the head of this block.
        let high = unsafe { [_mm256_srli_epi64::<32>(product[0]), _mm256_srli_epi64::<32>(product[1])] };
        self.xor(high, self.xor(b, c))
    }
    #[inline(always)]
    fn not_below(self, words: [Self::U64; 4], threshold: u16) -> u64 {
        // SAFETY: see the head of this block.
        unsafe {
            let [a_low, a_high] = octets(words[0][0], words[1][0], words[2][0], words[3][0]);
            let [b_low, b_high] = octets(words[0][1], words[1][1], words[2][1], words[3][1]);
            let limit = _mm256_set1_epi16(threshold.cast_signed());
            let low = not_below(a_low, b_low, limit);
            let high = not_below(a_high, b_high, limit);
            u64::from(low) | u64::from(high) << 32
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: see the head of this block; a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

/// `a` in the lanes whose bit (one to a lane) is set in `bits`, +0 elsewhere.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn keep_eight(a: __m256, bits: __m256i, lane: __m256i) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe { _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, lane), lane))) }
}

/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn widen_bf16(eight: __m128i) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(eight))) }
}

/// Bits of the nearest bfloat16 in the low half of each lane: half of the last place, less one where the last place is
/// even, is added. A NaN keeps its upper half, quiet.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn round_bf16(value: __m256) -> __m256i {
    // SAFETY: as the caller promises.
    unsafe {
        let bits = _mm256_castps_si256(value);
        let even = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    }
}

/// The four words of four octets, gathered: lanes 0 and 2 in the first result, 1 and 3 in the second.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn octets(w0: __m256i, w1: __m256i, w2: __m256i, w3: __m256i) -> [__m256i; 2] {
    // SAFETY: as the caller promises.
    unsafe {
        let first = _mm256_blend_epi32::<0xAA>(w0, _mm256_slli_epi64::<32>(w1));
        let second = _mm256_blend_epi32::<0xAA>(w2, _mm256_slli_epi64::<32>(w3));
        [_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second)]
    }
}

/// One bit for each of 32 unsigned 16-bit numbers: set where it is not below the limit.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn not_below(a: __m256i, b: __m256i, limit: __m256i) -> u32 {
    // SAFETY: as the caller promises.
    unsafe {
        let a = _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a);
        let b = _mm256_cmpeq_epi16(_mm256_max_epu16(b, limit), b);
        let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(a, b));
        _mm256_movemask_epi8(bytes).cast_unsigned()
    }
}
