//! One rollout's advantages and returns, from its last token to its first: the kernel of [`crate::returns`].
//!
//! `A[t] = delta[t] + w A[t + 1]` is one long chain, whose latency would be the whole cost. Eight tokens at a time therefore
//! become eight partial sums `S[i] = sum_{i <= j < 8} w^(j - i) delta[j]`, in which no group needs another, and then
//! `A[i] = S[i] + w^(8 - i) A[8]` adds what lies behind: the chain takes eight tokens a step. Where the model wrote only some
//! of eight tokens, they are taken one by one. Everything is float64, in one order on every instruction set.
use super::{Kernel, Simd};
use crate::reduce::LANES as SUMS;
use std::hint::{black_box, select_unpredictable};
use std::ops::Range;

/// Tokens that one step of the chain takes, and whose masks are looked at together.
const LANES: usize = 8;
/// The masks of eight tokens that the model wrote.
const ALL: u64 = u64::from_ne_bytes([1; LANES]);
/// The masks of eight tokens that it did not write.
const NONE: u64 = 0;

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
    pub(crate) bootstrap: f32,
    /// Whether masked places carry what the next model token has; they are 0 otherwise.
    pub(crate) carry: bool,
}

impl Rollout<'_> {
    /// The masks of eight tokens; `None` where there are fewer.
    #[inline(always)]
    fn word(&self, tokens: Range<usize>) -> Option<u64> {
        match self.mask {
            Some(mask) => mask[tokens].try_into().ok().map(u64::from_ne_bytes),
            None => (tokens.len() == LANES).then_some(ALL),
        }
    }

    /// Where the tokens begin that lie before `end` in groups of eight with these masks.
    #[inline(always)]
    fn start_of_run(&self, word: u64, mut end: usize) -> usize {
        if self.mask.is_none() {
            return end % LANES;
        }
        while end >= LANES && self.word(end - LANES..end) == Some(word) {
            end -= LANES;
        }
        end
    }
}

/// Powers of what the advantage of one step later weighs.
#[derive(Debug)]
struct Powers {
    /// `within[j][i] = weight^(j - i)`, and 0 where `j < i`.
    within: [[f64; LANES]; LANES],
    /// `behind[i] = weight^(8 - i)`.
    behind: [f64; LANES],
}

impl Powers {
    #[inline(always)]
    fn of(weight: f64) -> Self {
        let mut powers = [1.0; LANES + 1];
        for k in 0..LANES {
            powers[k + 1] = powers[k] * weight;
        }
        let within = std::array::from_fn(|j| std::array::from_fn(|i| if i <= j { powers[j - i] } else { 0.0 }));
        // A compiler that knows where the zeros are leaves them out, and has no whole vectors left.
        black_box(Self { within, behind: std::array::from_fn(|i| powers[LANES - i]) })
    }

    /// The advantages of eight tokens; `behind` is the advantage behind them, and becomes the first one's.
    #[inline(always)]
    fn step(&self, deltas: &[f64; LANES], behind: &mut f64) -> [f64; LANES] {
        let mut sums = [0.0; LANES];
        for (delta, powers) in deltas.iter().zip(&self.within) {
            for (sum, power) in sums.iter_mut().zip(powers) {
                *sum = power.mul_add(*delta, *sum);
            }
        }
        let first = sums[0];
        for (sum, power) in sums.iter_mut().zip(&self.behind) {
            *sum = power.mul_add(*behind, *sum);
        }
        *behind = self.behind[0].mul_add(*behind, first);
        sums
    }
}

/// The chain: its weights, and what the tokens before hear of those behind them.
#[derive(Debug)]
struct Chain {
    gamma: f64,
    powers: Powers,
    /// Where the returns have a lambda of their own.
    value_powers: Option<Powers>,
    value: f32,
    advantage: f64,
    /// Under the returns' lambda.
    value_advantage: f64,
}

impl Chain {
    #[inline(always)]
    fn new(rollout: &Rollout<'_>) -> Self {
        let Rollout { gamma, lam, value_lam, bootstrap, .. } = *rollout;
        Self {
            gamma,
            powers: Powers::of(gamma * lam),
            value_powers: value_lam.map(|lam| Powers::of(gamma * lam)),
            value: bootstrap,
            advantage: 0.0,
            value_advantage: 0.0,
        }
    }

    /// The advantages of eight tokens, and those that their returns are made of.
    #[inline(always)]
    fn step(&mut self, rewards: &[f32; LANES], values: &[f32; LANES]) -> [[f64; LANES]; 2] {
        let mut deltas = [0.0; LANES];
        for (i, delta) in deltas.iter_mut().enumerate() {
            let next = if i + 1 < LANES { values[i + 1] } else { self.value };
            let [reward, value, next] = [rewards[i], values[i], next].map(f64::from);
            *delta = self.gamma.mul_add(next, reward) - value;
        }
        // Else the compiler computes one at a time what it then needs in all lanes.
        let deltas = black_box(deltas);
        self.value = values[0];
        let advantages = self.powers.step(&deltas, &mut self.advantage);
        let Some(powers) = &self.value_powers else {
            self.value_advantage = self.advantage;
            return [advantages; 2];
        };
        [advantages, powers.step(&deltas, &mut self.value_advantage)]
    }
}

/// Writes the advantages and, where they are wanted, the returns of one rollout.
#[derive(Debug)]
pub(crate) struct Advantages<'a> {
    pub(crate) rollout: Rollout<'a>,
    pub(crate) advantages: &'a mut [f32],
    pub(crate) returns: Option<&'a mut [f32]>,
    /// Set to false where anything that was read is not finite.
    pub(crate) finite: &'a mut bool,
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
    #[inline(always)]
    fn work(mut self) {
        let mut chain = Chain::new(&self.rollout);
        let mut end = self.rollout.rewards.len();
        while end > 0 {
            let tokens = end.saturating_sub(LANES)..end;
            end = tokens.start;
            match self.rollout.word(tokens.clone()) {
                Some(word @ (ALL | NONE)) => {
                    end = self.rollout.start_of_run(word, end);
                    if word == ALL {
                        self.all(end..tokens.end, &mut chain);
                    } else {
                        self.pass_over(end..tokens.end, &chain);
                    }
                }
                _ => self.some(tokens, &mut chain),
            }
        }
        // A number that is not finite never leaves the chain again: infinity and NaN times 0 are NaN.
        *self.finite &= (chain.advantage + chain.value_advantage).is_finite();
    }

    /// Tokens that the model wrote: a whole number of eights.
    #[inline(always)]
    fn all(&mut self, tokens: Range<usize>, chain: &mut Chain) {
        let rewards = self.rollout.rewards[tokens.clone()].as_chunks().0;
        let values = self.rollout.values.map(|values| values[tokens.clone()].as_chunks().0);
        let advantages = self.advantages[tokens.clone()].as_chunks_mut().0;
        let mut returns = self.returns.as_deref_mut().map(|returns| returns[tokens].as_chunks_mut::<LANES>().0);
        for i in (0..rewards.len()).rev() {
            let values = values.map_or([0.0; LANES], |values| values[i]);
            let [found, of_returns] = chain.step(&rewards[i], &values);
            advantages[i] = found.map(|advantage| advantage as f32);
            if let Some(returns) = &mut returns {
                for ((to, advantage), value) in returns[i].iter_mut().zip(of_returns).zip(values) {
                    *to = (advantage + f64::from(value)) as f32;
                }
            }
        }
    }

    /// Tokens that the model did not write.
    #[inline(always)]
    fn pass_over(&mut self, tokens: Range<usize>, chain: &Chain) {
        let carry = self.rollout.carry;
        self.advantages[tokens.clone()].fill(if carry { chain.advantage as f32 } else { 0.0 });
        let Some(returns) = self.returns.as_deref_mut() else { return };
        let returns = &mut returns[tokens.clone()];
        match self.rollout.values.filter(|_| carry) {
            Some(values) => {
                let values = &values[tokens];
                for (to, value) in returns.iter_mut().zip(values) {
                    *to = (chain.value_advantage + f64::from(*value)) as f32;
                }
                *self.finite &= values.iter().fold(true, |finite, value| finite & value.is_finite());
            }
            None => returns.fill(0.0),
        }
    }

    /// At most eight tokens, whoever wrote them: one by one, without a branch that would have to guess who did.
    #[inline(always)]
    fn some(&mut self, tokens: Range<usize>, chain: &mut Chain) {
        let Rollout { rewards, values, mask, gamma, lam, value_lam, carry, .. } = self.rollout;
        let [weight, value_weight] = [lam, value_lam.unwrap_or(lam)].map(|lam| gamma * lam);
        for t in tokens.rev() {
            let is_of_model = mask.is_none_or(|mask| mask[t] != 0);
            let value = values.map_or(0.0, |values| values[t]);
            let delta = gamma.mul_add(f64::from(chain.value), f64::from(rewards[t])) - f64::from(value);
            let [advantage, value_advantage] =
                [weight.mul_add(chain.advantage, delta), value_weight.mul_add(chain.value_advantage, delta)];
            chain.value = select_unpredictable(is_of_model, value, chain.value);
            chain.advantage = select_unpredictable(is_of_model, advantage, chain.advantage);
            chain.value_advantage = select_unpredictable(is_of_model, value_advantage, chain.value_advantage);
            let shown = is_of_model || carry;
            self.advantages[t] = select_unpredictable(shown, chain.advantage as f32, 0.0);
            if let Some(returns) = self.returns.as_deref_mut() {
                let found = (chain.value_advantage + f64::from(value)) as f32;
                returns[t] = select_unpredictable(shown, found, 0.0);
            }
            *self.finite &= !shown | value.is_finite();
        }
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
