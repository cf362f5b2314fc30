//! What stands between the products of a gated layer: `silu(gate) * up`, rounded where a layer of torch's rounds.
use super::elementary::{LEAST, exp, exp_scalar};
use super::{Kernel, Simd, WIDTH};
use half::bf16;

/// 32 products with the gate's weight and as many with the other's.
pub(crate) struct Gate<'a> {
    pub(crate) gate: &'a [f32; 32],
    pub(crate) up: &'a [f32; 32],
    pub(crate) to: &'a mut [bf16; 32],
}

impl Kernel for Gate<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        for first in (0..32).step_by(WIDTH) {
            // SAFETY: 16 numbers from `first` on.
            unsafe {
                let gate = rounded(simd, simd.load_f32(self.gate.as_ptr().add(first)));
                let up = rounded(simd, simd.load_f32(self.up.as_ptr().add(first)));
                let product = simd.multiply(rounded(simd, silu(simd, gate)), up);
                simd.store_bf16(self.to.as_mut_ptr().add(first), product);
            }
        }
    }

    fn run_scalar(self) {
        let round = |x: f32| bf16::from_f32(x).to_f32();
        for ((gate, up), to) in self.gate.iter().zip(self.up).zip(self.to) {
            let gate = round(*gate);
            let e = exp_scalar(if -gate.abs() < LEAST { LEAST } else { -gate.abs() });
            let silu = if gate < 0.0 { gate * e / (1.0 + e) } else { gate / (1.0 + e) };
            *to = bf16::from_f32(round(silu) * round(*up));
        }
    }
}

/// The nearest bfloat16 numbers.
#[inline(always)]
fn rounded<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let mut lanes = [bf16::ZERO; WIDTH];
    // SAFETY: 16 lanes.
    unsafe {
        simd.store_bf16(lanes.as_mut_ptr(), x);
        simd.load_bf16(lanes.as_ptr())
    }
}

/// `x / (1 + exp(-x))`; of a NaN, a NaN.
#[inline(always)]
fn silu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
    let below = simd.subtract(zero, simd.maximum(x, simd.subtract(zero, x)));
    let e = exp(simd, simd.maximum(simd.splat(LEAST), below));
    let numerator = simd.choose_less(x, zero, simd.multiply(x, e), x);
    simd.divide(numerator, simd.add(one, e))
}

/// Rounds as many numbers as there is room for.
pub(crate) struct Round<'a> {
    pub(crate) from: &'a [f32; 32],
    pub(crate) to: &'a mut [bf16],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        let mut whole = [bf16::ZERO; 32];
        for first in (0..32).step_by(WIDTH) {
            // SAFETY: 16 numbers from `first` on.
            unsafe {
                let numbers = simd.load_f32(self.from.as_ptr().add(first));
                simd.store_bf16(whole.as_mut_ptr().add(first), numbers);
            }
        }
        self.to.copy_from_slice(&whole[..self.to.len()]);
    }

    fn run_scalar(self) {
        for (from, to) in self.from.iter().zip(self.to) {
            *to = bf16::from_f32(*from);
        }
    }
}
