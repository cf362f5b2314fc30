//! One rollout's advantages and returns, from its last token to its first: the kernel of [`crate::returns`].
//!
//! `A[t] = delta[t] + w A[t + 1]` is one long chain, whose latency would be the whole cost. A run of the model's tokens is
//! therefore worked on in blocks: `S[t] = sum_{k < 8} w^k delta[t + k]` comes of three passes that know no order
//! (`x[t] + w x[t + 1]`, then with `w^2` and a shift of 2, then with `w^4` and 4), and `A[t] = S[t] + w^8 A[t + 8]` takes
//! eight tokens a step. Everything is float64, multiplied and added apart, so that every instruction set gives the same
//! bits.
use super::{Kernel, Simd};
use crate::reduce::LANES as SUMS;
use std::hint::select_unpredictable;

/// Tokens that are worked on at once: few enough that the scratch stays in the first-level cache.
const BLOCK: usize = 512;
/// Tokens that one step of the chain takes.
const LANES: usize = 8;
/// A run below this length is cheaper token by token.
const FEW: usize = 24;
/// Masks are compared so many tokens at a time.
const MASKS: usize = 64;

/// What one rollout is computed from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rollout<'a> {
    pub(crate) rewards: &'a [f32],
    /// `None`: all zero.
    pub(crate) values: Option<&'a [f32]>,
    /// Not 0 where the model wrote the token; `None`: everywhere.
    pub(crate) mask: Option<&'a [u8]>,
    pub(crate) gamma: f64,
    pub(crate) lam: f64,
    /// Where it is not `lam`.
    pub(crate) value_lam: Option<f64>,
    pub(crate) bootstrap: f64,
    /// Whether masked places carry what the next model token has; they are 0 otherwise.
    pub(crate) carry: bool,
}

/// Room for a block; made once for many rollouts.
#[derive(Debug)]
pub(crate) struct Scratch {
    deltas: [f64; BLOCK + LANES],
    odd: [f64; BLOCK + LANES],
    even: [f64; BLOCK + LANES],
}

impl Scratch {
    pub(crate) const fn new() -> Self {
        Self { deltas: [0.0; BLOCK + LANES], odd: [0.0; BLOCK + LANES], even: [0.0; BLOCK + LANES] }
    }
}

/// Writes the advantages and, where they are wanted, the returns of one rollout.
#[derive(Debug)]
pub(crate) struct Advantages<'a> {
    pub(crate) rollout: Rollout<'a>,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) advantages: &'a mut [f32],
    pub(crate) returns: Option<&'a mut [f32]>,
    /// Set to false where anything that was read is not finite.
    pub(crate) finite: &'a mut bool,
}

/// What the tokens before hear of those behind them.
#[derive(Debug, Clone, Copy)]
struct Behind {
    value: f64,
    /// Under `lam`.
    advantage: f64,
    /// Under `value_lam`; the same where that is the same.
    value_advantage: f64,
}

impl Kernel for Advantages<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, _simd: S) {
        self.work();
    }

    fn run_scalar(self) {
        self.work();
    }
}

impl Advantages<'_> {
    /// Run after run of equal masks; where they change, token by token.
    #[inline(always)]
    fn work(mut self) {
        let mut behind = Behind { value: self.rollout.bootstrap, advantage: 0.0, value_advantage: 0.0 };
        let mut end = self.rollout.rewards.len();
        while end > 0 {
            let start = self.rollout.mask.map_or(0, |mask| start_of_run(&mask[..end]));
            if start == end {
                end = end.saturating_sub(MASKS);
                self.mixed(end, start, &mut behind);
                continue;
            }
            if self.rollout.mask.is_some_and(|mask| mask[start] == 0) {
                self.pass_over(start, end, behind);
            } else {
                self.model_tokens(start, end, &mut behind);
            }
            end = start;
        }
        // A number that is not finite never leaves the chain again: infinity and NaN times 0 are NaN.
        *self.finite &= (behind.advantage + behind.value_advantage).is_finite();
    }

    #[inline(always)]
    fn pass_over(&mut self, start: usize, end: usize, behind: Behind) {
        let carried = if self.rollout.carry { behind.advantage as f32 } else { 0.0 };
        self.advantages[start..end].fill(carried);
        let Some(returns) = self.returns.as_deref_mut() else { return };
        match self.rollout.values.filter(|_| self.rollout.carry) {
            Some(values) => {
                for (to, value) in returns[start..end].iter_mut().zip(&values[start..end]) {
                    *to = (behind.value_advantage + f64::from(*value)) as f32;
                    *self.finite &= value.is_finite();
                }
            }
            None => returns[start..end].fill(0.0),
        }
    }

    #[inline(always)]
    fn model_tokens(&mut self, start: usize, mut end: usize, behind: &mut Behind) {
        while end > start {
            let first = start.max(end.saturating_sub(BLOCK));
            if end - first < FEW {
                self.mixed(first, end, behind);
            } else {
                self.block(first, end, behind);
            }
            end = first;
        }
    }

    /// Token by token, without a branch that would have to guess who wrote it.
    #[inline(always)]
    fn mixed(&mut self, start: usize, end: usize, behind: &mut Behind) {
        let Rollout { rewards, values, mask, gamma, lam, value_lam, carry, .. } = self.rollout;
        let (mut finite, mut state) = (true, *behind);
        for t in (start..end).rev() {
            let is_of_model = mask.is_none_or(|mask| mask[t] != 0);
            let value = values.map_or(0.0, |values| f64::from(values[t]));
            let delta = f64::from(rewards[t]) + gamma * state.value - value;
            let advantage = delta + gamma * lam * state.advantage;
            let value_advantage = value_lam.map_or(advantage, |lam| delta + gamma * lam * state.value_advantage);
            state.value = select_unpredictable(is_of_model, value, state.value);
            state.advantage = select_unpredictable(is_of_model, advantage, state.advantage);
            state.value_advantage = select_unpredictable(is_of_model, value_advantage, state.value_advantage);
            let shown = is_of_model || carry;
            self.advantages[t] = select_unpredictable(shown, state.advantage as f32, 0.0);
            if let Some(returns) = self.returns.as_deref_mut() {
                returns[t] = select_unpredictable(shown, (state.value_advantage + value) as f32, 0.0);
            }
            finite &= !shown | value.is_finite();
        }
        *self.finite &= finite;
        *behind = state;
    }

    #[inline(always)]
    fn block(&mut self, start: usize, end: usize, behind: &mut Behind) {
        let Rollout { rewards, values, gamma, lam, value_lam, .. } = self.rollout;
        let Scratch { deltas, odd, even } = &mut *self.scratch;
        let count = end - start;
        let values = values.map(|values| &values[start..end]);
        fill_deltas(&mut deltas[..count], &rewards[start..end], values, gamma, behind.value);
        deltas[count..count + LANES].fill(0.0);
        behind.value = values.map_or(0.0, |values| f64::from(values[0]));

        let sums = scan(deltas, odd, even, count, gamma * lam, behind.advantage);
        behind.advantage = sums[0];
        for (to, sum) in self.advantages[start..end].iter_mut().zip(sums) {
            *to = *sum as f32;
        }
        let sums = match value_lam {
            Some(lam) => scan(deltas, odd, even, count, gamma * lam, behind.value_advantage),
            None => sums,
        };
        behind.value_advantage = sums[0];
        let Some(returns) = self.returns.as_deref_mut() else { return };
        let returns = &mut returns[start..end];
        match values {
            Some(values) => {
                for ((to, sum), value) in returns.iter_mut().zip(sums).zip(values) {
                    *to = (sum + f64::from(*value)) as f32;
                }
            }
            None => returns.iter_mut().zip(sums).for_each(|(to, sum)| *to = *sum as f32),
        }
    }
}

/// Where the run of equal masks begins that the last one belongs to, as far as whole groups of [`MASKS`] go: the end where
/// there is not one.
#[inline(always)]
fn start_of_run(mask: &[u8]) -> usize {
    let (mut end, last) = (mask.len(), mask[mask.len() - 1]);
    while end >= MASKS && mask[end - MASKS..end].iter().fold(0, |differs, m| differs | (m ^ last)) == 0 {
        end -= MASKS;
    }
    end
}

/// `delta[t] = reward[t] + gamma value[t + 1] - value[t]`, with `next` as the value behind the last.
#[inline(always)]
fn fill_deltas(deltas: &mut [f64], rewards: &[f32], values: Option<&[f32]>, gamma: f64, next: f64) {
    let last = deltas.len() - 1;
    match values {
        Some(values) => {
            let pairs = values.iter().zip(&values[1..]);
            for ((delta, reward), (value, next)) in deltas.iter_mut().zip(rewards).zip(pairs) {
                *delta = f64::from(*reward) + gamma * f64::from(*next) - f64::from(*value);
            }
            deltas[last] = f64::from(rewards[last]) + gamma * next - f64::from(values[last]);
        }
        None => {
            deltas.iter_mut().zip(rewards).for_each(|(delta, reward)| *delta = f64::from(*reward));
            deltas[last] += gamma * next;
        }
    }
}

/// `A[t] = delta[t] + weight A[t + 1]` for the first `count` deltas, with `behind` as the `A` behind them; the deltas are as
/// they were afterwards, and zeros follow them.
#[inline(always)]
fn scan<'a>(
    deltas: &mut [f64; BLOCK + LANES],
    odd: &'a mut [f64; BLOCK + LANES],
    even: &mut [f64; BLOCK + LANES],
    count: usize,
    weight: f64,
    behind: f64,
) -> &'a [f64] {
    let whole = count.next_multiple_of(LANES);
    let (last, two) = (deltas[count - 1], weight * weight);
    let four = two * two;
    deltas[count - 1] += weight * behind;
    ahead::<1>(deltas, weight, &mut odd[..count]);
    odd[count..whole.max(count + 2)].fill(0.0);
    ahead::<2>(odd, two, &mut even[..count]);
    even[count..whole.max(count + 4)].fill(0.0);
    ahead::<4>(even, four, &mut odd[..count]);
    odd[count..whole].fill(0.0);
    deltas[count - 1] = last;
    let (eight, mut sums) = (four * four, [0.0; LANES]);
    for chunk in odd[..whole].as_chunks_mut::<LANES>().0.iter_mut().rev() {
        for (sum, own) in sums.iter_mut().zip(chunk.iter_mut()) {
            *sum = *own + eight * *sum;
            *own = *sum;
        }
    }
    &odd[..count]
}

/// `to[t] = from[t] + weight from[t + SHIFT]`
#[inline(always)]
fn ahead<const SHIFT: usize>(from: &[f64], weight: f64, to: &mut [f64]) {
    for ((to, own), other) in to.iter_mut().zip(from).zip(&from[SHIFT..]) {
        *to = own + weight * other;
    }
}

/// Numbers that sums are taken of: `x`, or `x - minus`, less `mean`, squared where `squared`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) minus: Option<&'a [f32]>,
    /// Places where this is 0 do not count.
    pub(crate) mask: Option<&'a [u8]>,
    pub(crate) mean: f64,
    pub(crate) squared: bool,
}

/// Adds term `i` to lane `i % 256`.
#[derive(Debug)]
pub(crate) struct Sum<'a> {
    pub(crate) terms: Terms<'a>,
    pub(crate) lanes: &'a mut [f64; SUMS],
}

impl Kernel for Sum<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, _simd: S) {
        self.work();
    }

    fn run_scalar(self) {
        self.work();
    }
}

impl Sum<'_> {
    #[inline(always)]
    fn work(self) {
        let Terms { x, minus, mask, mean, squared } = self.terms;
        for start in (0..x.len()).step_by(SUMS) {
            let place = start..x.len().min(start + SUMS);
            let mut terms = [0.0_f64; SUMS];
            for (term, x) in terms.iter_mut().zip(&x[place.clone()]) {
                *term = f64::from(*x);
            }
            if let Some(minus) = minus {
                terms.iter_mut().zip(&minus[place.clone()]).for_each(|(term, x)| *term -= f64::from(*x));
            }
            for term in &mut terms[..place.len()] {
                let centred = *term - mean;
                *term = if squared { centred * centred } else { centred };
            }
            if let Some(mask) = mask {
                for (term, m) in terms.iter_mut().zip(&mask[place]) {
                    *term = if *m == 0 { 0.0 } else { *term };
                }
            }
            self.lanes.iter_mut().zip(terms).for_each(|(lane, term)| *lane += term);
        }
    }
}

/// Writes `shift + scale (x - mean)`; 0 where `mask` is 0.
#[derive(Debug)]
pub(crate) struct Rescale<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) mask: Option<&'a [u8]>,
    pub(crate) mean: f64,
    pub(crate) scale: f64,
    pub(crate) shift: f64,
    pub(crate) to: &'a mut [f32],
}

impl Kernel for Rescale<'_> {
    #[inline(always)]
    fn run<S: Simd, const GROUPS: usize>(self, _simd: S) {
        self.work();
    }

    fn run_scalar(self) {
        self.work();
    }
}

impl Rescale<'_> {
    #[inline(always)]
    fn work(self) {
        for (to, x) in self.to.iter_mut().zip(self.x) {
            *to = (self.shift + self.scale * (f64::from(*x) - self.mean)) as f32;
        }
        if let Some(mask) = self.mask {
            for (to, m) in self.to.iter_mut().zip(mask) {
                *to = if *m == 0 { 0.0 } else { *to };
            }
        }
    }
}
