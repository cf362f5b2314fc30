//! The softmax between attention's two products: products of keys and queries in, weights for the values out.
use super::elementary::{LEAST, exp, exp_scalar};
use super::{Kernel, Simd, WIDTH};
use crate::matrix_unit::{GROUP, Line};
use half::bf16;

/// Below every product of a visible pair; what is hidden gets this one.
pub(crate) const NOTHING: f32 = -1e30;
const HALF: f32 = 0.5 * NOTHING;

/// Which pairs of some keys and 32 queries are visible: the queries from a key on that are before its end, in a window.
pub(crate) struct Pairs<'a> {
    /// The first key's row and the first query's.
    pub(crate) rows: (usize, usize),
    /// Of each key, the row before which queries see it.
    pub(crate) ends: &'a [f32],
    /// Of each key and of the 32 queries.
    pub(crate) positions: (&'a [f32], &'a [f32]),
    pub(crate) window: f32,
}

/// Weights of some keys for 32 queries.
pub(crate) struct Softmax<'a> {
    /// Products of keys and queries, `[keys, 32]`, overwritten where pairs are hidden.
    pub(crate) products: &'a mut [[f32; GROUP]],
    /// `None`: every pair is visible.
    pub(crate) pairs: Option<Pairs<'a>>,
    pub(crate) scale: f32,
    /// Of each query over all keys so far: the largest product, and the sum of weights.
    pub(crate) largest: &'a mut [f32; GROUP],
    pub(crate) sums: &'a mut [f32; GROUP],
    /// What earlier weights are to be multiplied by.
    pub(crate) correction: &'a mut [f32; GROUP],
    /// The weights, packed as columns: for each two keys, 16 queries and then 16 others.
    pub(crate) to: &'a mut [Line],
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(mut self, simd: S) {
        for half in 0..GROUP / WIDTH {
            self.hide(simd, half * WIDTH);
            self.weigh(simd, half);
        }
    }

    fn run_scalar(self) {
        for q in 0..GROUP {
            let mut largest = self.largest[q];
            for (k, products) in self.products.iter_mut().enumerate() {
                if let Some(pairs) = &self.pairs {
                    let (key, query) = (pairs.rows.0 + k, pairs.rows.1 + q);
                    let near = pairs.positions.1[q] - pairs.positions.0[k] < pairs.window;
                    if key > query || (query as f32) >= pairs.ends[k] || !near {
                        products[q] = NOTHING;
                    }
                }
                largest = if products[q] > largest { products[q] } else { largest };
            }
            let power = |x: f32| exp_scalar(if x > LEAST { x } else { LEAST });
            self.correction[q] = power((self.largest[q] - largest) * self.scale);
            self.largest[q] = largest;
            let mut sum = self.sums[q] * self.correction[q];
            for (k, products) in self.products.iter().enumerate() {
                let x = products[q];
                let weight = if x < HALF { 0.0 } else { power((x - largest) * self.scale) };
                sum += weight;
                let line = k / GROUP * GROUP + q / WIDTH * WIDTH + k % GROUP / 2;
                self.to[line].0[q % WIDTH * 2 + k % 2] = bf16::from_f32(weight);
            }
            self.sums[q] = sum;
        }
    }
}

impl Softmax<'_> {
    /// Puts [`NOTHING`] in the place of hidden pairs of 16 queries.
    #[inline(always)]
    fn hide<S: Simd>(&mut self, simd: S, start: usize) {
        let Some(pairs) = &self.pairs else { return };
        let mut queries = [0.0_f32; WIDTH];
        for (i, query) in queries.iter_mut().enumerate() {
            *query = (pairs.rows.1 + start + i) as f32;
        }
        let (nothing, window) = (simd.splat(NOTHING), simd.splat(pairs.window));
        // SAFETY: 16 numbers each.
        unsafe {
            let queries = simd.load_f32(queries.as_ptr());
            let positions = simd.load_f32(pairs.positions.1.as_ptr().add(start));
            for (k, products) in self.products.iter_mut().enumerate() {
                let at = products.as_mut_ptr().add(start);
                let x = simd.choose_less(queries, simd.splat(pairs.ends[k]), simd.load_f32(at), nothing);
                let x = simd.choose_less(queries, simd.splat((pairs.rows.0 + k) as f32), nothing, x);
                let distance = simd.subtract(positions, simd.splat(pairs.positions.0[k]));
                simd.store_f32(at, simd.choose_less(distance, window, x, nothing));
            }
        }
    }

    /// Weights of 16 queries.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, half: usize) {
        let start = half * WIDTH;
        let (scale, nothing) = (simd.splat(self.scale), simd.splat(HALF));
        // SAFETY: 16 numbers each, and a packed line for each two keys, of which there are multiples of 32.
        unsafe {
            let before = simd.load_f32(self.largest.as_ptr().add(start));
            let (mut even, mut odd) = (before, before);
            for products in self.products.as_chunks::<2>().0 {
                even = simd.maximum(simd.load_f32(products[0].as_ptr().add(start)), even);
                odd = simd.maximum(simd.load_f32(products[1].as_ptr().add(start)), odd);
            }
            let largest = simd.maximum(even, odd);
            let correction = power(simd, before, largest, scale);
            simd.store_f32(self.largest.as_mut_ptr().add(start), largest);
            simd.store_f32(self.correction.as_mut_ptr().add(start), correction);
            let mut sums = [simd.multiply(simd.load_f32(self.sums.as_ptr().add(start)), correction), simd.splat(0.0)];
            for (pair, products) in self.products.as_chunks::<2>().0.iter().enumerate() {
                let a = simd.load_f32(products[0].as_ptr().add(start));
                let b = simd.load_f32(products[1].as_ptr().add(start));
                let a = simd.choose_less(a, nothing, simd.splat(0.0), power(simd, a, largest, scale));
                let b = simd.choose_less(b, nothing, simd.splat(0.0), power(simd, b, largest, scale));
                sums = [simd.add(sums[0], a), simd.add(sums[1], b)];
                let line = pair / WIDTH * GROUP + start + pair % WIDTH;
                simd.store_bf16_pairs(self.to[line].0.as_mut_ptr(), a, b);
            }
            simd.store_f32(self.sums.as_mut_ptr().add(start), simd.add(sums[0], sums[1]));
        }
    }
}

/// `e^((x - largest) * scale)`, and nothing smaller than [`exp`] gives.
#[inline(always)]
fn power<S: Simd>(simd: S, x: S::F32, largest: S::F32, scale: S::F32) -> S::F32 {
    exp(simd, simd.maximum(simd.multiply(simd.subtract(x, largest), scale), simd.splat(LEAST)))
}

/// Multiplies rows of 32 numbers by as many factors, column by column.
pub(crate) struct Correct<'a> {
    pub(crate) factors: &'a [f32; GROUP],
    pub(crate) numbers: &'a mut [[f32; GROUP]],
}

impl Kernel for Correct<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, simd: S) {
        for numbers in self.numbers {
            for start in (0..GROUP).step_by(WIDTH) {
                // SAFETY: 16 numbers each.
                unsafe {
                    let at = numbers.as_mut_ptr().add(start);
                    let factor = simd.load_f32(self.factors.as_ptr().add(start));
                    simd.store_f32(at, simd.multiply(simd.load_f32(at), factor));
                }
            }
        }
    }

    fn run_scalar(self) {
        for numbers in self.numbers {
            numbers.iter_mut().zip(self.factors).for_each(|(x, factor)| *x *= factor);
        }
    }
}
