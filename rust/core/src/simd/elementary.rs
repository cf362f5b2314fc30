//! Exponential function and hyperbolic tangent in float32, the same bits on every instruction set.
//!
//! Both are polynomials after a reduction of the argument; the coefficients minimise the largest relative error (Lawson's
//! iteration on Chebyshev nodes). The tests hold the errors below [`EXP_ERROR`] and [`TANH_ERROR`].
use super::Simd;
use std::f32::consts::{LN_2, LOG2_E};

/// 1.5 * 2^23: adding it rounds a small number to an integer, which then stands in the low bits.
pub(crate) const MAGIC: f32 = 12_582_912.0;
/// Least argument of [`exp`]: 2^n stays a normal number.
pub(crate) const LEAST: f32 = -86.0;
/// Largest relative error of [`exp`].
#[cfg(test)]
pub(crate) const EXP_ERROR: f64 = 1.0e-7;
/// Largest relative error of [`tanh`].
#[cfg(test)]
pub(crate) const TANH_ERROR: f64 = 1.5e-7;

/// ln 2 less its float32.
const LN_2_REST: f32 = -1.904_654_3e-9;
/// `(e^r - 1 - r) / r^2` on |r| < 0.3466, within 3.1e-9 of `e^r`.
const EXP: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_716, 0.001_381_46];
/// `(tanh x - x) / x^3` in powers of `x^2` on |x| < 0.625, within 4.4e-9 of `tanh x`.
const TANH: [f32; 5] = [-0.333_332_8, 0.133_314_42, -0.053_739_715, 0.020_639_09, -0.005_704_990_6];
/// Where the polynomial ends.
const TANH_SMALL: f32 = 0.625;
/// From here on tanh is 1.
const TANH_LARGE: f32 = 10.0;

/// `e^x` for `x` from [`LEAST`] to 80.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let magic = simd.splat(MAGIC);
    let rounded = simd.multiply_add(x, simd.splat(LOG2_E), magic);
    let n = simd.subtract(rounded, magic);
    let r = simd.multiply_add(n, simd.splat(-LN_2), x);
    let r = simd.multiply_add(n, simd.splat(-LN_2_REST), r);
    let mut q = simd.splat(EXP[4]);
    for c in [EXP[3], EXP[2], EXP[1], EXP[0]] {
        q = simd.multiply_add(q, r, simd.splat(c));
    }
    let e = simd.add(simd.multiply_add(q, simd.multiply(r, r), r), simd.splat(1.0));
    simd.multiply(e, simd.power_of_two(rounded))
}

/// [`exp`] in plain Rust.
pub(crate) fn exp_scalar(x: f32) -> f32 {
    let rounded = x.mul_add(LOG2_E, MAGIC);
    let n = rounded - MAGIC;
    let r = n.mul_add(-LN_2_REST, n.mul_add(-LN_2, x));
    let q = EXP.iter().rev().skip(1).fold(EXP[4], |q, c| q.mul_add(r, *c));
    let e = q.mul_add(r * r, r) + 1.0;
    e * f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let (zero, one, large) = (simd.splat(0.0), simd.splat(1.0), simd.splat(TANH_LARGE));
    let size = simd.maximum(x, simd.subtract(zero, x));
    let size = simd.choose_less(large, size, large, size);
    let square = simd.multiply(size, size);
    let mut q = simd.splat(TANH[4]);
    for c in [TANH[3], TANH[2], TANH[1], TANH[0]] {
        q = simd.multiply_add(q, square, simd.splat(c));
    }
    let small = simd.multiply_add(q, simd.multiply(square, size), size);
    let e = exp(simd, simd.add(size, size));
    let rest = simd.subtract(one, simd.divide(simd.splat(2.0), simd.add(e, one)));
    let t = simd.choose_less(size, simd.splat(TANH_SMALL), small, rest);
    simd.choose_less(x, zero, simd.subtract(zero, t), t)
}

/// [`tanh`] in plain Rust.
pub(crate) fn tanh_scalar(x: f32) -> f32 {
    let size = if x > 0.0 - x { x } else { 0.0 - x };
    let size = if TANH_LARGE < size { TANH_LARGE } else { size };
    let square = size * size;
    let q = TANH.iter().rev().skip(1).fold(TANH[4], |q, c| q.mul_add(square, *c));
    let t =
        if size < TANH_SMALL { q.mul_add(square * size, size) } else { 1.0 - 2.0 / (exp_scalar(size + size) + 1.0) };
    if x < 0.0 { 0.0 - t } else { t }
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, Level, WIDTH};
    use super::*;

    /// Each number, by the level's vectors or by plain Rust.
    struct Apply<'a> {
        tanh: bool,
        numbers: &'a mut [[f32; WIDTH]],
    }

    impl Kernel for Apply<'_> {
        #[inline(always)]
        fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
            for numbers in self.numbers {
                // SAFETY: 16 numbers.
                unsafe {
                    let x = simd.load_f32(numbers.as_ptr());
                    let y = if self.tanh { tanh(simd, x) } else { exp(simd, x) };
                    simd.store_f32(numbers.as_mut_ptr(), y);
                }
            }
        }
        fn run_scalar(self) {
            let function = if self.tanh { tanh_scalar } else { exp_scalar };
            self.numbers.as_flattened_mut().iter_mut().for_each(|x| *x = function(*x));
        }
    }

    /// The worst relative error over `arguments`, which all levels agree about.
    fn worst(tanh: bool, arguments: &[[f32; WIDTH]], exact: fn(f64) -> f64) -> f64 {
        let mut expected = arguments.to_vec();
        Level::Scalar.run(Apply { tanh, numbers: &mut expected });
        for level in Level::available() {
            let mut actual = arguments.to_vec();
            level.run(Apply { tanh, numbers: &mut actual });
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            assert!(actual.as_flattened().iter().zip(expected.as_flattened()).all(same), "{}", level.name());
        }
        let error = |(x, y): (&f32, &f32)| {
            let exact = exact(f64::from(*x));
            if exact == 0.0 { f64::from(*y) } else { ((f64::from(*y) - exact) / exact).abs() }
        };
        arguments.as_flattened().iter().zip(expected.as_flattened()).map(error).fold(0.0, f64::max)
    }

    fn between(least: f32, most: f32) -> Vec<[f32; WIDTH]> {
        let step = (most - least) / 1_048_575.0;
        let numbers: Vec<f32> = (0..1 << 20).map(|i| (least + i as f32 * step).min(most)).collect();
        numbers.as_chunks().0.to_vec()
    }

    #[test]
    fn exponentials_are_exact_to_the_stated_error() {
        for (least, most) in [(LEAST, 0.0), (-1.0, 1.0), (-1e-3, 1e-3), (0.0, 80.0)] {
            let error = worst(false, &between(least, most), f64::exp);
            assert!(error < EXP_ERROR, "{error} from {least} to {most}");
        }
        assert_eq!(exp_scalar(0.0).to_bits(), 1.0_f32.to_bits());
        assert!(worst(false, &between(-1.0, 0.0), |x| (x + 3e-7).exp()) > EXP_ERROR, "the check can fail");
    }

    #[test]
    fn tangents_are_exact_to_the_stated_error() {
        for size in [0.01, 0.7, 5.0, 100.0] {
            let error = worst(true, &between(-size, size), f64::tanh);
            assert!(error < TANH_ERROR, "{error} within {size}");
        }
        assert!(tanh_scalar(f32::INFINITY) == 1.0 && tanh_scalar(f32::NEG_INFINITY) == -1.0);
    }

    #[test]
    fn nan_stays_nan() {
        for bits in [0x7fc0_0000, 0x7fc0_0001, 0xffc0_0100, 0x7f80_0001] {
            for level in Level::available() {
                for tanh in [false, true] {
                    let mut numbers = [[f32::from_bits(bits); WIDTH]];
                    level.run(Apply { tanh, numbers: &mut numbers });
                    assert!(numbers[0].iter().all(|x| x.is_nan()));
                }
            }
        }
    }
}
