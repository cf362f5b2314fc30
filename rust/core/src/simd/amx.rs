//! Intel AMX: products of bfloat16 tiles, added in float32. Stable Rust has no intrinsics for it, so that its instructions
//! are written out here.
//!
//! A tile is 16 lines of 64 bytes. [`Tiles::multiply`] multiplies 32 rows with 32 columns, which takes all eight tiles.
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Bytes of the 32 rows, or columns, of one step: 32 products of each row with each column.
pub(crate) const STEP_BYTES: usize = 2048;

/// Whether this processor has the unit, and the system lets this process use it.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| super::Level::Avx512.is_available() && has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    __get_cpuid_max(0).0 >= 7 && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
}

/// Linux gives the registers, which are large, to processes that ask for them.
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call takes two numbers and touches no memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The tile registers of this thread, ready for use while this value is there.
pub(crate) struct Tiles(PhantomData<*const ()>);

#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    lines: [u8; 16],
}

impl Tiles {
    /// # Panics
    /// Where the unit is not available.
    pub(crate) fn new() -> Self {
        assert!(is_available());
        let (mut line_bytes, mut lines) = ([0; 16], [0; 16]);
        line_bytes[..8].fill(64);
        lines[..8].fill(16);
        let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], line_bytes, lines };
        // SAFETY: the unit is there, and reads the 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack)) };
        Self(PhantomData)
    }

    /// The products of 32 rows with 32 columns over `steps` steps, as 32 rows of 32 numbers that are `stride` numbers apart;
    /// with `add`, added to what is there.
    ///
    /// # Safety
    /// `rows` and `columns` are `steps` times [`STEP_BYTES`] that can be read, and `to` can be written as said.
    #[inline]
    pub(crate) unsafe fn multiply(
        &self,
        rows: *const u8,
        columns: *const u8,
        steps: usize,
        to: *mut f32,
        stride: usize,
        add: bool,
    ) {
        let lower = to.wrapping_add(16 * stride);
        // SAFETY: as the caller promises; the registers are configured.
        unsafe {
            if add {
                asm!(
                    "tileloadd tmm0, [{to} + {stride}]",
                    "tileloadd tmm1, [{to} + {stride} + 64]",
                    "tileloadd tmm2, [{lower} + {stride}]",
                    "tileloadd tmm3, [{lower} + {stride} + 64]",
                    to = in(reg) to, lower = in(reg) lower, stride = in(reg) 4 * stride, options(nostack),
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
            }
            if steps > 0 {
                asm!(
                    "2:",
                    "tileloadd tmm4, [{rows} + {line}]",
                    "tileloadd tmm6, [{columns} + {line}]",
                    "tileloadd tmm7, [{columns} + {line} + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{rows} + {line} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {rows}, 2048",
                    "add {columns}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    rows = inout(reg) rows => _, columns = inout(reg) columns => _, steps = inout(reg) steps => _,
                    line = in(reg) 64_usize, options(nostack),
                );
            }
            asm!(
                "tilestored [{to} + {stride}], tmm0",
                "tilestored [{to} + {stride} + 64], tmm1",
                "tilestored [{lower} + {stride}], tmm2",
                "tilestored [{lower} + {stride} + 64], tmm3",
                to = in(reg) to, lower = in(reg) lower, stride = in(reg) 4 * stride, options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the unit is there, as there is a `Tiles`.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// Writes 16 lines of 16 pairs of numbers with line and pair exchanged.
///
/// # Safety
/// The processor has AVX-512 F; `from` are 16 lines of 64 readable bytes, and `to` has room for 1024.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn transpose(from: [*const u8; 16], to: *mut u8) {
    let mut a = [_mm512_setzero_si512(); 16];
    let mut b = a;
    // SAFETY: as the caller promises.
    unsafe {
        for (line, from) in a.iter_mut().zip(from) {
            *line = _mm512_loadu_si512(from.cast());
        }
    }
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    // Part `p` of `a[4 * i + j]` now holds pair `4 * p + j` of lines `4 * i` to `4 * i + 3`.
    for j in 0..4 {
        let even = [0, 8].map(|i| _mm512_shuffle_i32x4::<0x88>(a[i + j], a[i + 4 + j]));
        let odd = [0, 8].map(|i| _mm512_shuffle_i32x4::<0xdd>(a[i + j], a[i + 4 + j]));
        b[j] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        b[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        b[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        b[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    for (i, line) in b.iter().enumerate() {
        // SAFETY: as the caller promises.
        unsafe { _mm512_storeu_si512(to.wrapping_add(64 * i).cast(), *line) };
    }
}

/// Two rows of 32 numbers as 32 pairs: those of the first 16 columns, and those of the last.
///
/// # Safety
/// The processor has AVX-512 BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn interleave(first: &[bf16; 32], second: &[bf16; 32]) -> ([bf16; 32], [bf16; 32]) {
    let (mut lower, mut upper) = ([bf16::ZERO; 32], [bf16::ZERO; 32]);
    // SAFETY: each array is 64 bytes; the loads and stores need no alignment.
    unsafe {
        let a = _mm512_loadu_si512(first.as_ptr().cast());
        let b = _mm512_loadu_si512(second.as_ptr().cast());
        // In each part of eight numbers, the first four pairs, and the last four.
        let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
        let order = [_mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4)];
        _mm512_storeu_si512(lower.as_mut_ptr().cast(), _mm512_permutex2var_epi64(low, order[0], high));
        _mm512_storeu_si512(upper.as_mut_ptr().cast(), _mm512_permutex2var_epi64(low, order[1], high));
    }
    (lower, upper)
}
